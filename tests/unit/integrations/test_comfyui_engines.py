"""Other programs run ComfyUI's files: an early ComfyUI with its present kernels, and Inline Core.

    pip install comfy-kitchen omegaconf einops torchsde torchdiffeq
    pip install --no-deps comfylib omnichar-core

`comfylib` is ComfyUI's network of Stable Diffusion with its samplers, as of March 2023. It predates eight-bit weights:
its linear layers get the tensors of `comfy-kitchen` here, as those of ComfyUI do today. `omnichar-core` is Inline Core,
which loads the eight-bit files itself.
"""

from __future__ import annotations

import collections
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import EulerDiscreteScheduler, UNet2DConditionModel
from diffusers.loaders import single_file_model
from safetensors.torch import save_file
from torch import Tensor, nn

from edadm_cli.integrations.comfyui.names import PREFIX, original_names
from edadm_cli.integrations.comfyui.writing import comfyui_state
from edadm_cli.models.example_calls import example_call
from tests.unit.integrations.comfyui_kinds import KINDS, narrow_flux_conversion, quantize_all

TURNED = 0.01
"""Bound on the relative L2 distance between two computations of one network: sums in another order turn some codes of
inputs into their neighbours, which is a 127th of the largest input of a token."""
WIDTHS, HEADS, TEXT = [32, 64], 8, 16


def _distance(a: Tensor, b: Tensor) -> float:
    return float((a - b).norm() / b.norm())


def _rounded(module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor]:
    """Rounds the input of a layer as ComfyUI does: to eight bits, with one scale per token."""
    step = (args[0].abs().amax(-1, keepdim=True) / 127).clamp_min(1e-30)
    return ((args[0] / step).round() * step,)


def _in_eight_bits(denoiser: nn.Module, weights: dict[str, Tensor]) -> nn.Module:
    """A float denoiser with some weights, all of whose linear layers round their inputs."""
    denoiser.load_state_dict({**denoiser.state_dict(), **weights})
    for layer in denoiser.modules():
        if isinstance(layer, nn.Linear):
            layer.register_forward_pre_hook(_rounded)
    return denoiser.requires_grad_(False).eval()


@pytest.fixture
def comfy_config(monkeypatch: pytest.MonkeyPatch) -> Any:
    """ComfyUI's configuration of Stable Diffusion 1.5, and numbers for its questions about a GPU's memory."""
    sd = pytest.importorskip("comfy.hazard.sd", reason="pip install --no-deps comfylib")
    yaml = pytest.importorskip("yaml")
    monkeypatch.setattr(torch.cuda, "memory_stats", lambda *_: collections.Counter())
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda *_: (2**30, 2**30))
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    return yaml.safe_load((Path(sd.__file__).parents[1] / "configs" / "v1-inference.yaml").read_text())["model"]


def _instantiated(config: Any) -> Any:
    from comfy.hazard.ldm.util import instantiate_from_config

    return instantiate_from_config(config)


def test_names_and_shapes_of_stable_diffusion_are_those_of_comfyuis_network(comfy_config: Any) -> None:
    with torch.device("meta"):
        theirs = _instantiated(comfy_config["params"]["unet_config"]).state_dict()
        ours = UNet2DConditionModel(sample_size=64, cross_attention_dim=768)
    tensors = ours.state_dict()
    sources = original_names(ours, tensors)
    assert len(sources) == 686
    assert {name: tensors[source.names[0]].shape for name, source in sources.items()} == {
        name: tensor.shape for name, tensor in theirs.items()
    }


def _unet() -> Any:
    return UNet2DConditionModel(
        sample_size=8, block_out_channels=WIDTHS, layers_per_block=1, cross_attention_dim=TEXT,
        attention_head_dim=HEADS, norm_num_groups=32, down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    )  # fmt: skip


def _loaded_by_comfyui(config: Any, state: dict[str, Tensor]) -> Any:
    """ComfyUI's model with the tensors of a file: codes become the tensors of comfy-kitchen."""
    kitchen = pytest.importorskip("comfy_kitchen.tensor", reason="pip install comfy-kitchen")
    config["params"]["unet_config"]["params"] |= {
        "model_channels": WIDTHS[0], "channel_mult": [1, 2], "num_res_blocks": 1, "attention_resolutions": [1],
        "num_heads": HEADS, "context_dim": TEXT, "use_checkpoint": False,
    }  # fmt: skip
    model = _instantiated(config).eval()
    network = model.model.diffusion_model
    expected = set(network.state_dict())
    for name in expected:
        module, _, leaf = name.rpartition(".")
        value = state[PREFIX + name]
        if value.dtype == torch.int8:
            scale = state[f"{PREFIX}{module}.weight_scale"]
            shape = {"scale": scale, "orig_dtype": torch.float32, "orig_shape": tuple(value.shape)}
            value = kitchen.QuantizedTensor(value, "TensorWiseINT8Layout", kitchen.TensorWiseINT8Layout.Params(**shape))
        else:
            value = value.float()
        setattr(network.get_submodule(module), leaf, nn.Parameter(value, requires_grad=False))
    beside = (".weight_scale", ".comfy_quant")
    assert {name.removeprefix(PREFIX) for name in state if not name.endswith(beside)} == expected
    return model


@torch.no_grad()
def test_comfyuis_network_and_sampler_draw_what_diffusers_draws(comfy_config: Any) -> None:
    torch.manual_seed(0)
    quantized, reference = _unet(), _unet()
    weights = quantize_all(quantized)
    floats = {name: value for name, value in quantized.state_dict().items() if name in reference.state_dict()}
    state = comfyui_state(quantized)
    model = _loaded_by_comfyui(comfy_config, state)
    reference = _in_eight_bits(reference, {**floats, **weights})
    noise, prompt, empty = torch.randn(1, 4, 8, 8), torch.randn(1, 5, TEXT), torch.randn(1, 5, TEXT)

    from comfy.hazard.samplers import KSampler

    sampler = KSampler(model, steps=4, device=torch.device("cpu"), sampler="sample_euler", scheduler="normal")
    theirs = sampler.sample(noise, [[prompt, {}]], [[empty, {}]], cfg=2.0)

    betas = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
    scheduler = EulerDiscreteScheduler(**betas, timestep_spacing="linspace")
    scheduler.set_timesteps(4)
    latents = noise * scheduler.init_noise_sigma
    for timestep in scheduler.timesteps:
        rows = scheduler.scale_model_input(latents.repeat(2, 1, 1, 1), timestep)
        without, asked = reference(rows, timestep, torch.cat([empty, prompt]))[0].chunk(2)
        latents = scheduler.step(without + 2.0 * (asked - without), timestep, latents).prev_sample
    assert _distance(theirs, latents) < TURNED
    assert _distance(theirs, noise * scheduler.init_noise_sigma) > 10 * TURNED


@pytest.mark.parametrize("kind", ["flux", "sd3"])
@torch.no_grad()
def test_inline_core_computes_with_the_codes_of_the_file(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = pytest.importorskip("inline_core.models.int8_single_file", reason="pip install --no-deps omnichar-core")
    torch.manual_seed(0)
    quantized = KINDS[kind]()
    reference = KINDS[kind]()
    floats = {name: value.clone() for name, value in quantized.state_dict().items()}
    weights = quantize_all(quantized)
    state = comfyui_state(quantized)
    quantized.save_config(tmp_path)
    save_file(state, tmp_path / "denoiser.safetensors")
    flux = {"checkpoint_mapping_fn": lambda checkpoint, **_: narrow_flux_conversion()(checkpoint)}
    monkeypatch.setitem(single_file_model.SINGLE_FILE_LOADABLE_CLASSES, "FluxTransformer2DModel", flux)
    theirs = engine.load_single_file(
        type(quantized), str(tmp_path / "denoiser.safetensors"), config=str(tmp_path), dtype=torch.float32
    )
    layers = {name: layer for name, layer in theirs.named_modules() if type(layer).__name__ == "ComfyInt8Linear"}
    assert sum(len(layer.weight) for layer in layers.values()) == sum(
        len(c) for c in state.values() if c.dtype == torch.int8
    )
    for name, layer in layers.items():
        assert torch.equal(layer.weight, weights[f"{name}.weight"])
    reference = _in_eight_bits(reference, {**floats, **weights})
    args, kwargs = example_call(reference, batch_size=1)
    assert _distance(theirs(*args, **kwargs)[0], reference(*args, **kwargs)[0]) < TURNED
