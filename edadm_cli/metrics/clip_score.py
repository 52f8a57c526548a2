r"""Measures how well images fit their prompts in the joint space of a CLIP model, which open_clip supplies.

$$ \text{CLIP score} = \mathbb{E} \cos(E_\text{image}(x), E_\text{text}(c)) $$

the plain cosine, without the factor 2.5 or 100 that other definitions have.

References:
    Hessel et al., CLIPScore (arXiv 2104.08718), section 3; Radford et al. (arXiv 2103.00020).
"""

from __future__ import annotations

import contextlib
import io
import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torchvision.transforms.functional import to_pil_image

from edadm_cli.errors import InputError, MachineError

_TIMEOUT_S = 10.0


@dataclass(frozen=True)
class ClipScorer:
    """A CLIP model on its device.

    Args:
        name: Its name in results, `architecture/weights`.
        model: The model in float32.
        preprocess: Converts a PIL image to the model's input.
        tokenizer: Converts texts to tokens with shape `(B, L)`.
        device: The device of the model.
    """

    name: str
    model: Any
    preprocess: Callable[[Any], Tensor]
    tokenizer: Callable[[list[str]], Tensor]
    device: torch.device

    @torch.inference_mode()
    def score(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """Returns the cosine between each image and its prompt, as float64 with shape `(B,)`.

        Args:
            images: 8-bit levels with shape `(B, 3, H, W)`.
            prompts: One prompt per image.
        """
        pixels = torch.stack([self.preprocess(to_pil_image(image)) for image in images])  # [B, 3, S, S]
        tokens = self.tokenizer(list(prompts))
        image_features = self.model.encode_image(pixels.to(self.device), normalize=True)
        text_features = self.model.encode_text(tokens.to(self.device), normalize=True)
        cosine: Tensor = (image_features.double() * text_features.double()).sum(dim=1)
        return cosine.cpu()


def load_clip(architecture: str, pretrained: str, device: torch.device) -> ClipScorer:
    """Loads a CLIP model by its open_clip name and a tag or a file of weights.

    Raises:
        InputError: There is no such model or tag, the file does not fit, or the weights cannot be downloaded.
        MachineError: open_clip is not installed.
    """
    try:
        import open_clip
    except ImportError as error:
        raise MachineError(
            "The CLIP score needs open_clip, which is not installed.", hint="pip install open_clip_torch"
        ) from error
    is_file = Path(pretrained).is_file()
    _require_known(architecture, pretrained, is_file)
    try:
        with _quiet():
            if not is_file:
                _require_reachable(open_clip.get_pretrained_cfg(architecture, pretrained).get("hf_hub", ""))
            model, _, preprocess = open_clip.create_model_and_transforms(
                architecture, pretrained=pretrained, device=device
            )
    except Exception as error:  # open_clip, torch, the hub and pickle raise different kinds of errors
        problem = (
            "do not fit it or are no file of tensors" if is_file else "are not in the cache and cannot be downloaded"
        )
        raise InputError(
            f"The CLIP model {architecture} was expected with the weights '{pretrained}', which {problem}.",
            hint="--clip-model NAME --clip-pretrained FILE",
        ) from error
    weights = Path(pretrained).name if is_file else pretrained
    tokenizer = open_clip.get_tokenizer(architecture)
    return ClipScorer(f"{architecture}/{weights}", model.eval(), preprocess, tokenizer, device)


def _require_known(architecture: str, pretrained: str, is_file: bool) -> None:
    import open_clip

    if architecture not in open_clip.list_models():
        raise InputError(f"open_clip knows no model '{architecture}'.", hint="--clip-model ViT-B-32")
    tags = open_clip.list_pretrained_tags_by_model(architecture)
    if not is_file and pretrained not in tags:
        raise InputError(
            f"'{pretrained}' is neither a file nor a tag that open_clip has for {architecture} "
            f"({', '.join(tags) or 'it has none'}).",
            hint="--clip-pretrained FILE",
        )


def _require_reachable(repository: str) -> None:
    """Asks the hub once where its cache is empty: the client's own download would ask for most of a minute."""
    from huggingface_hub import HfApi, scan_cache_dir
    from huggingface_hub.errors import CacheNotFound

    repo_id = repository.rstrip("/")
    with contextlib.suppress(CacheNotFound):
        if any(repo.repo_id == repo_id for repo in scan_cache_dir().repos):
            return
    if repo_id:
        HfApi().model_info(repo_id, timeout=_TIMEOUT_S)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keeps open_clip and the hub's client from writing to the terminal; a stage has its reporter."""
    before = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        logging.disable(before)
