"""The lines of Python that load an export and generate with it, and the name that the hub has for such pipelines."""

from __future__ import annotations

import inspect
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from edadm_cli.artifacts import load_json
from edadm_cli.models.pipeline_calls.images import CONTROL, IMAGE, MASK
from edadm_cli.models.sources.files import INDEX_NAME

_PROMPT = '"a prompt"'
_FILES = {IMAGE: "picture.png", CONTROL: "control.png", MASK: "mask.png"}
_CLIP_LENGTHS = ("num_frames", "video_length")


@dataclass(frozen=True)
class PipelineUse:
    """What a pipeline generates, and from what.

    Attributes:
        arguments: The arguments of a call, as Python code by the name of the parameter.
        makes_clips: Whether it generates clips instead of pictures.
    """

    arguments: dict[str, str] = field(default_factory=dict)
    makes_clips: bool = False

    @classmethod
    def of_folder(cls, folder: Path, takes_prompts: bool, takes_images: bool) -> PipelineUse:
        """Reads which pipeline a folder holds.

        Args:
            folder: A diffusers folder.
            takes_prompts: Whether the pipeline was calibrated with prompts.
            takes_images: Whether images conditioned it.
        """
        import diffusers

        pipeline = getattr(diffusers, str(load_json(folder / INDEX_NAME).get("_class_name")), None)
        parameters: dict[str, Any] = {}
        if pipeline is not None:
            parameters = dict(inspect.signature(pipeline.__call__).parameters)
        arguments = {"prompt": _PROMPT} if takes_prompts else {}
        if takes_images:
            arguments |= {name: f'load_image("{file}")' for name, file in _FILES.items() if name in parameters}
        labels = parameters.get("class_labels")
        if labels is not None and labels.default is inspect.Parameter.empty:
            arguments["class_labels"] = "[0]"
        return cls(arguments, makes_clips=any(name in parameters for name in _CLIP_LENGTHS))

    def tag(self) -> str:
        """Returns the hub's `pipeline_tag`."""
        if not set(_FILES).isdisjoint(self.arguments):
            source = "image"
        elif "prompt" in self.arguments:
            source = "text"
        else:
            return "unconditional-image-generation"
        return f"{source}-to-{'video' if self.makes_clips else 'image'}"

    def code(self, place: str) -> str:
        """Returns the lines of Python that load the pipeline and generate one picture or clip.

        Args:
            place: The argument of `from_pretrained`.
        """
        helpers = ["export_to_video"] if self.makes_clips else []
        helpers += ["load_image"] if not set(_FILES).isdisjoint(self.arguments) else []
        call = ", ".join(f"{name}={code}" for name, code in self.arguments.items())
        if list(self.arguments) == ["prompt"]:
            call = _PROMPT
        lines = ["from diffusers import DiffusionPipeline"]
        if helpers:
            lines.append(f"from diffusers.utils import {', '.join(helpers)}")
        lines.append(f"pipeline = DiffusionPipeline.from_pretrained({json.dumps(place)})")
        if self.makes_clips:
            return "\n".join([*lines, f"frames = pipeline({call}).frames[0]", 'export_to_video(frames, "clip.mp4")'])
        return "\n".join([*lines, f"image = pipeline({call}).images[0]"])
