r"""Stage `encoder`: trains the picture encoder and the text encoder together, on pictures and captions.

The training minimises $-\sum_j p_{ij} \log \mathrm{softmax}_j(s\, u_i \cdot v_j)$ in both directions, with unit vectors
$u_i$ of pictures and $v_j$ of captions and a learned scale $s$. $p_{ij}$ is uniform over the captions $j$ that are true
of picture $i$: those that have its name and name no other style. A second vector per caption, the mean of its tokens'
states before the last layer, takes part in the same loss. It makes every token's state useful to the denoisers, which
attend to these states.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import CLIPTextModelWithProjection

from edadm_cli.models.emoji.encoder import EMBEDDING, PictureEncoder
from edadm_cli.models.emoji.train.corpus import Corpus, draw_captions
from edadm_cli.models.emoji.train.loop import Schedule
from edadm_cli.models.emoji.train.networks import TEXT_WIDTH, text_config
from edadm_cli.models.emoji.train.settings import TrainSettings

NAME = "encoder"
SCHEDULE = Schedule(batch_size=1024, learning_rate=1e-3, weight_decay=0.1, average_decay=0.998)
_TOKEN_WEIGHT = 0.5
_SHIFT = 3


class PairTask:
    """Trains both encoders to map pictures and captions into one space."""

    def __init__(self, corpus: Corpus, settings: TrainSettings) -> None:
        torch.manual_seed(settings.seed)
        self.corpus = corpus
        self.text_encoder = CLIPTextModelWithProjection(text_config(settings.small))
        self.picture_encoder = PictureEncoder()
        self.token_projection = nn.Linear(TEXT_WIDTH, EMBEDDING, bias=False)
        self.module = nn.ModuleDict({
            "text": self.text_encoder, "picture": self.picture_encoder, "token": self.token_projection,
        }).to(settings.device)  # fmt: skip

    def draw(self, count: int, generator: torch.Generator) -> tuple[Tensor, ...]:
        """Returns shifted pictures, caption tokens, and the distribution of the captions that are true of each."""
        device = generator.device
        train = self.corpus.train
        index = train[torch.randint(len(train), (count,), generator=generator, device=device)]
        tokens, styled = draw_captions(self.corpus, index, 0.0, generator)
        names, styles = self.corpus.name_number[index], self.corpus.style_number[index]
        same_style = (styles[:, None] == styles[None, :]) | ~styled[None, :]
        true = ((names[:, None] == names[None, :]) & same_style).float()  # [picture, caption]
        return self._augmented(index, generator), tokens, true

    def _augmented(self, index: Tensor, generator: torch.Generator) -> Tensor:
        pictures = self.corpus.pixels[index].float() / 255
        device, count = generator.device, len(index)
        moves = torch.randint(2 * _SHIFT + 1, (2, count), generator=generator, device=device)
        padded = functional.pad(pictures, (_SHIFT,) * 4, value=1.0)
        rows = moves[0][:, None] + torch.arange(64, device=device)  # [B, 64]
        columns = moves[1][:, None] + torch.arange(64, device=device)
        batch = torch.arange(count, device=device)[:, None, None]
        shifted = padded.permute(0, 2, 3, 1)[batch, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)
        contrast = 1 + 0.2 * (torch.rand(count, 3, 1, 1, generator=generator, device=device) - 0.5)
        noise = 0.03 * torch.randn(shifted.shape, generator=generator, device=device)
        return ((shifted - 1) * contrast + 1 + noise).clamp(0, 1)

    def loss(self, *inputs: Tensor) -> Tensor:
        """Returns the contrastive loss of the captions' vectors, plus half of that of their tokens' mean states."""
        pictures, tokens, true = inputs
        embedding = self.picture_encoder(pictures).embedding
        output = self.text_encoder(tokens, output_hidden_states=True)
        ends = (tokens == tokens[0, -1]).int().cumsum(1) <= 1  # up to the first end token
        states = output.hidden_states[-2] * ends[..., None]
        mean = self.token_projection(states.sum(1) / ends.sum(1, keepdim=True))
        scale = self.picture_encoder.log_scale.clamp(max=4.6).exp()
        whole = _contrast(embedding, output.text_embeds, true, scale)
        return whole + _TOKEN_WEIGHT * _contrast(embedding, mean, true, scale)


def _contrast(pictures: Tensor, captions: Tensor, true: Tensor, scale: Tensor) -> Tensor:
    logits = scale * pictures.float() @ functional.normalize(captions.float(), dim=-1).T
    by_picture = -(true / true.sum(1, keepdim=True) * logits.log_softmax(1)).sum(1).mean()
    by_caption = -(true / true.sum(0, keepdim=True) * logits.log_softmax(0)).sum(0).mean()
    return (by_picture + by_caption) / 2
