r"""Stages `emoji-sd`, `emoji-dit` and `ddpm-emoji`: train the denoisers."""

from __future__ import annotations

import sys
import time

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import CLIPTextModelWithProjection

from edadm_cli.models.emoji.captions import MAX_TOKENS
from edadm_cli.models.emoji.encoder import EMBEDDING
from edadm_cli.models.emoji.train.autoencoder import encode, load_autoencoder, to_model_input
from edadm_cli.models.emoji.train.corpus import Corpus, Pictures, draw_captions
from edadm_cli.models.emoji.train.loop import Schedule
from edadm_cli.models.emoji.train.networks import (
    TEXT_WIDTH,
    build_pixel_unet,
    build_transformer,
    build_unet,
    noise_scheduler,
    pixel_scheduler,
)
from edadm_cli.models.emoji.train.packed import SMALL_SIZE, small_pictures
from edadm_cli.models.emoji.train.settings import TrainSettings

UNET_SCHEDULE = Schedule(batch_size=1024, learning_rate=1e-3)
TRANSFORMER_SCHEDULE = Schedule(batch_size=512, learning_rate=1e-3)
PIXEL_SCHEDULE = Schedule(batch_size=256, learning_rate=4e-4, average_decay=0.999)
_EMPTY_PROMPT_SHARE = 0.1
_ABSENT_TOKENS = 256  # the number of zero tokens that StableDiffusion3Pipeline uses if it has no third text encoder
_SNR_LIMIT = 5.0


def load_text_encoder(settings: TrainSettings) -> CLIPTextModelWithProjection:
    """Loads the trained text encoder in float32, with its weights frozen."""
    encoder = CLIPTextModelWithProjection.from_pretrained(settings.weights / "shared" / "text_encoder")
    return encoder.to(settings.device, torch.float32).eval().requires_grad_(False)


def compiled(network: nn.Module, settings: TrainSettings, *inputs: Tensor) -> nn.Module:
    """Returns the network, compiled and warmed up on example inputs, or as it is if compilation fails or is off."""
    if not settings.compile:
        return network
    start = time.monotonic()
    try:
        fast: nn.Module = torch.compile(network)  # type: ignore[assignment]
        with torch.autocast("cuda", torch.bfloat16, enabled=settings.device.type == "cuda"):
            output = fast(*(value.to(settings.device) for value in inputs), return_dict=False)[0]
        output.float().square().mean().backward()
    except Exception as error:  # noqa: BLE001
        print(f"compilation failed, training continues without: {error}"[:2000], file=sys.stderr, flush=True)
        torch._dynamo.reset()
        fast = network
    network.zero_grad(set_to_none=True)
    print(f"compiled in {time.monotonic() - start:.0f} s", file=sys.stderr, flush=True)
    return fast


def wait_for(settings: TrainSettings, *stages: str) -> None:
    """Waits until the records of other stages exist, if the settings say so."""
    while settings.wait and not all((settings.out / "records" / f"{stage}.json").is_file() for stage in stages):
        time.sleep(0.5)


class _LatentTask:
    """Holds what the two text-to-image tasks share: the latents, the captions and the text encoder."""

    def __init__(self, corpus: Corpus, settings: TrainSettings, network: nn.Module, *inputs: Tensor) -> None:
        self.module = network.to(settings.device)
        self._network = compiled(self.module, settings, *inputs)
        wait_for(settings, "encoder", "autoencoder")
        self._text_encoder = load_text_encoder(settings)
        self._corpus = corpus
        autoencoder = load_autoencoder(settings)
        scale = autoencoder.config.scaling_factor
        self._mean, self._deviation = (moment.clone() * scale for moment in encode(autoencoder, corpus.pixels))

    def _latents(self, count: int, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
        """Returns scaled latents `(B, 4, 16, 16)`, noise of the same shape, and caption tokens `(B, 24)`."""
        device, train = generator.device, self._corpus.train
        index = train[torch.randint(len(train), (count,), generator=generator, device=device)]
        mean = self._mean[index]
        spread, noise = torch.randn(2, *mean.shape, generator=generator, device=device)
        tokens, _ = draw_captions(self._corpus, index, _EMPTY_PROMPT_SHARE, generator)
        return mean + self._deviation[index] * spread, noise, tokens


class UNetTask(_LatentTask):
    r"""Minimises $\min(1, 5 / \mathrm{SNR}_t)\,|\epsilon - \epsilon_\theta(z_t, t, c)|^2$ over noisy latents $z_t$.

    The noisy latents are $z_t = \sqrt{\bar\alpha_t} z + \sqrt{1 - \bar\alpha_t}\, \epsilon$.

    References:
        Efficient diffusion training via Min-SNR weighting, arXiv 2303.09556.
    """

    def __init__(self, corpus: Corpus, settings: TrainSettings) -> None:
        torch.manual_seed(settings.seed)
        network = build_unet(settings.small)
        if settings.device.type == "cuda":
            network = network.to(memory_format=torch.channels_last)
        count = (settings.batch_size or UNET_SCHEDULE.batch_size) // settings.world
        states = torch.zeros(count, MAX_TOKENS, TEXT_WIDTH)
        super().__init__(corpus, settings, network, torch.zeros(count, 4, 16, 16), torch.zeros(count).long(), states)
        self._signal = noise_scheduler().alphas_cumprod.to(settings.device)

    def draw(self, count: int, generator: torch.Generator) -> tuple[Tensor, ...]:
        """Returns noisy latents, timesteps, caption tokens, the noise and the weight of each picture's error."""
        latents, noise, tokens = self._latents(count, generator)
        timestep = torch.randint(len(self._signal), (count,), generator=generator, device=generator.device)
        signal = self._signal[timestep].view(-1, 1, 1, 1)
        noisy = signal.sqrt() * latents + (1 - signal).sqrt() * noise
        return noisy, timestep, tokens, noise, snr_weight(signal)

    def loss(self, *inputs: Tensor) -> Tensor:
        """Returns the weighted mean squared error of the predicted noise."""
        noisy, timestep, tokens, noise, weight = inputs
        with torch.no_grad():
            states = self._text_encoder(tokens).last_hidden_state.float()
        predicted = self._network(noisy, timestep, states, return_dict=False)[0]
        return (weight * (predicted.float() - noise).square()).mean()


class TransformerTask(_LatentTask):
    r"""Minimises $|(\epsilon - z) - v_\theta((1 - \sigma) z + \sigma \epsilon, 1000\,\sigma, c)|^2$.

    $\sigma$ has a logit-normal distribution.

    References:
        Scaling rectified flow transformers, arXiv 2403.03206, section 3.1.
    """

    def __init__(self, corpus: Corpus, settings: TrainSettings) -> None:
        torch.manual_seed(settings.seed)
        count = (settings.batch_size or TRANSFORMER_SCHEDULE.batch_size) // settings.world
        states, pooled = (
            torch.zeros(count, MAX_TOKENS + _ABSENT_TOKENS, 2 * TEXT_WIDTH),
            torch.zeros(count, 2 * EMBEDDING),
        )
        network = build_transformer(settings.small)
        super().__init__(corpus, settings, network, torch.zeros(count, 4, 16, 16), states, pooled, torch.zeros(count))

    def draw(self, count: int, generator: torch.Generator) -> tuple[Tensor, ...]:
        """Returns noisy latents, timesteps, caption tokens and the velocity."""
        latents, noise, tokens = self._latents(count, generator)
        sigma = torch.randn(count, generator=generator, device=generator.device).sigmoid()
        spread = sigma.view(-1, 1, 1, 1)
        return (1 - spread) * latents + spread * noise, 1000 * sigma, tokens, noise - latents

    def loss(self, *inputs: Tensor) -> Tensor:
        """Returns the mean squared error of the predicted velocity."""
        noisy, timestep, tokens, velocity = inputs
        states, pooled = flow_condition(self._text_encoder, tokens)
        predicted = self._network(noisy, states, pooled, timestep, return_dict=False)[0]
        return functional.mse_loss(predicted.float(), velocity)


@torch.no_grad()
def flow_condition(text_encoder: CLIPTextModelWithProjection, tokens: Tensor) -> tuple[Tensor, Tensor]:
    """Returns the text condition that StableDiffusion3Pipeline computes if it holds one text encoder twice.

    Returns:
        Two tensors. The states `(B, 280, 384)` hold 24 tokens with the states of both encoders side by side, and then
        256 zero tokens for the third encoder, which is absent. The pooled vectors have the shape `(B, 384)`.
    """
    output = text_encoder(tokens, output_hidden_states=True)
    states = output.hidden_states[-2].float().repeat(1, 1, 2)
    absent = states.new_zeros(len(states), _ABSENT_TOKENS, states.shape[2])
    return torch.cat([states, absent], dim=1), output.text_embeds.float().repeat(1, 2)


class PixelTask:
    r"""Minimises $\min(1, 5 / \mathrm{SNR}_t)\,|\epsilon - \epsilon_\theta(x_t, t)|^2$ over noisy pictures $x_t$.

    The noisy pictures of 32x32 pixels are $x_t = \sqrt{\bar\alpha_t} x + \sqrt{1 - \bar\alpha_t}\, \epsilon$. None is
    mirrored: letters, flags and arrows have a side. The timesteps of a batch are evenly spread around a random one,
    which makes the loss less noisy.

    References:
        Denoising diffusion probabilistic models, arXiv 2006.11239, equation 14.
        Efficient diffusion training via Min-SNR weighting, arXiv 2303.09556.
        Variational diffusion models, arXiv 2107.00630, appendix I.1 (the timesteps of a batch).
    """

    def __init__(self, pictures: Pictures, settings: TrainSettings) -> None:
        torch.manual_seed(settings.seed)
        self.module = build_pixel_unet(settings.small).to(settings.device)
        if settings.device.type == "cuda":
            self.module = self.module.to(memory_format=torch.channels_last)
        count = (settings.batch_size or PIXEL_SCHEDULE.batch_size) // settings.world
        example = torch.zeros(count, 3, SMALL_SIZE, SMALL_SIZE)
        self._network = compiled(self.module, settings, example, torch.zeros(count).long())
        self._pictures = small_pictures(pictures.pixels[pictures.train])
        self._signal = pixel_scheduler().alphas_cumprod.to(settings.device)

    def draw(self, count: int, generator: torch.Generator) -> tuple[Tensor, ...]:
        """Returns noisy pictures, their timesteps, the noise and the weight of each picture's error."""
        device = generator.device
        index = torch.randint(len(self._pictures), (count,), generator=generator, device=device)
        pictures = to_model_input(self._pictures[index])
        noise = torch.randn(pictures.shape, generator=generator, device=device)
        first = torch.rand(1, generator=generator, device=device)
        spread = (first + torch.arange(count, device=device) / count) % 1
        timestep = (spread * len(self._signal)).long().clamp(max=len(self._signal) - 1)
        signal = self._signal[timestep].view(-1, 1, 1, 1)
        return signal.sqrt() * pictures + (1 - signal).sqrt() * noise, timestep, noise, snr_weight(signal)

    def loss(self, *inputs: Tensor) -> Tensor:
        """Returns the weighted mean squared error of the predicted noise."""
        noisy, timestep, noise, weight = inputs
        predicted = self._network(noisy, timestep, return_dict=False)[0]
        return (weight * (predicted.float() - noise).square()).mean()


def snr_weight(signal: Tensor) -> Tensor:
    r"""Returns $\min(1, 5 / \mathrm{SNR})$, the weight of a noise prediction, for shares $\bar\alpha$ of the signal."""
    return (_SNR_LIMIT * (1 - signal) / signal).clamp(max=1)
