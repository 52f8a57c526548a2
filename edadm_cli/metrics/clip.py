"""The CLIP score as a metric; the model is in `edadm_cli.metrics.clip_score`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from edadm_cli.metrics.base import INCEPTION, Context, Metric, Value

if TYPE_CHECKING:
    import torch

    from edadm_cli.metrics.clip_score import ClipScorer


class ClipScore(Metric):
    """The mean cosine of image and prompt in the space of a CLIP model."""

    name = "clip_score"
    label = "CLIP score"
    better = "higher"
    description = "how well images fit their prompts"
    needs = frozenset({"prompts"})

    def default_in(self, space: str) -> bool:
        """Returns whether CLIP is meaningful: it is for photographs and drawings, not for digits of 32 pixels."""
        return space == INCEPTION

    def identity(self, config: Any) -> dict[str, Any]:
        """Returns the tag of the weights, or the hash of their file."""
        from edadm_cli.artifacts import file_sha256

        path = Path(config.clip_pretrained)
        return {"clip_pretrained": file_sha256(path) if path.is_file() else config.clip_pretrained}

    def open(self, config: Any, device: torch.device) -> ClipScorer:
        """Loads the CLIP model."""
        from edadm_cli.metrics.clip_score import load_clip

        return load_clip(config.clip_model, config.clip_pretrained, device)

    def compute(self, context: Context, resource: ClipScorer) -> Value:
        """See `ClipScorer.score`."""
        import torch

        assert context.prompts is not None
        scores, start = [], 0
        for images, _ in context.images.pairs():
            colours = images.expand(-1, 3, -1, -1)
            scores.append(resource.score(colours, context.prompts[start : start + len(images)]))
            start += len(images)
        return Value(float(torch.cat(scores).mean()), f"clip/{resource.name}", len(context.images))


METRICS: tuple[Metric, ...] = (ClipScore(),)
