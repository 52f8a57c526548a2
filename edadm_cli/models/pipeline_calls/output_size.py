"""The size of what a pipeline samples: height and width in pixels, and the number of frames of a clip."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from edadm_cli.errors import UsageError
from edadm_cli.models.pipeline_calls.parameters import call_parameters

if TYPE_CHECKING:
    from edadm_cli.models.loaded import LoadedModel
    from edadm_cli.models.registry import ModelEntry


def with_sizes(model: LoadedModel, sizes: Mapping[str, int]) -> ModelEntry:
    """Returns the defaults of a model with other sizes.

    Args:
        model: The pipeline.
        sizes: Values by the names of the arguments of the pipeline's call.

    Raises:
        UsageError: The call of the pipeline has no argument of such a name, because its denoiser fixes the size. Or one
            of height and width is missing: many pipelines take their own size then, whatever the other one is.
    """
    parameters = call_parameters(model.pipeline)
    for name in sizes:
        if name not in parameters:
            raise UsageError(
                f"{type(model.pipeline).__name__} has no argument '{name}', so --{name.replace('_', '-')} has no "
                f"meaning for {model.ref.id}."
            )
    return entry_with_sizes(model.entry, sizes)


def entry_with_sizes(entry: ModelEntry, sizes: Mapping[str, int]) -> ModelEntry:
    """Returns defaults with other sizes, which the pipeline's call takes; see `with_sizes`."""
    arguments = {**entry.call_arguments, **sizes}
    require_both_sides(arguments)
    return entry.model_copy(update={"call_arguments": arguments})


def require_both_sides(arguments: Mapping[str, Any]) -> None:
    """Refuses arguments of a pipeline's call with a height and no width, or the reverse.

    Raises:
        UsageError: One of them is missing.
    """
    if len({"height", "width"} & arguments.keys()) == 1:
        raise UsageError("--height and --width are given together, and only one of them was.")


def picture_size(entry: ModelEntry) -> tuple[int, int] | None:
    """Returns the width and height in pixels of the pictures that condition a model; `None` where it has no size."""
    width, height = (entry.call_arguments.get(name, entry.image_size) for name in ("width", "height"))
    return None if width is None or height is None else (int(width), int(height))
