"""The record of everything that this tool knows about one family of denoisers."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from typing import Any, Literal

from torch import nn

from edadm_cli.models.families.values import ExampleValues

Call = tuple[tuple[Any, ...], dict[str, Any]]
UnitKind = Literal["residual", "transformer", "attention", "layer"]

TIMESTEP_ARGUMENTS = ("timestep", "timesteps", "t")
TIME_EMBEDDINGS = ("TimestepEmbedding", "CombinedTimestepLabelEmbeddings", "CombinedTimestepTextProjEmbeddings")


@dataclass(frozen=True)
class DenoiserFamily:
    """Holds what this tool knows about the denoisers of one family. Only the first two fields have no default.

    Attributes:
        name: The short name that messages use, such as `flux`.
        denoisers: The names of the denoiser classes that belong to the family. Their subclasses belong to it too.
        blocks: The classes that are reconstructed as one unit, with the kind of each. `None` stands for diffusers'
            `_repeated_blocks`, or for the classes of the repeated module lists if a model has no such attribute.
        embeddings: The classes of modules that embed the timestep and other vectors per image. Their layers count as
            the edge of the network.
        block_lists: The names of attributes that may hold the blocks in order, the preferred one first. The middle
            block of the first list that exists gives the mid-block feature. If none exists, the `mid_block` gives it,
            or else the longest list of blocks.
        sample_arguments: The names that the noisy sample may have as an argument of `forward`.
        timestep_arguments: The names that the timestep may have as an argument of `forward`.
        shared_arguments: The names of arguments that hold one tensor for all images, or a list of such tensors,
            whatever their sizes.
        ragged_layers: Parts of the names of layers that multiply tokens of all images at once, if the number of tokens
            differs from image to image. These layers are left in float.
        joined_arguments: The names of arguments whose first dimension may hold several entries per image one after the
            other, such as one prompt per frame of a clip.
        rows_second: The names of arguments whose second dimension counts the rows, such as text states of several
            layers, with shape `(layers, R, *)`.
        masks: The names of mask arguments, each with the argument whose second dimension it masks. If a pipeline omits
            such a mask, nothing is masked. A mask of ones is then recorded, so that all calls have one form and prompts
            of different lengths can be padded.
        hiding_masks: The names of mask arguments `(R, tokens)` of zeros and ones, each with the argument whose tokens
            it hides where it is 0. A hidden token has no influence at all on the prediction.
        conditional_first: The pipelines that put the conditional rows of a guided call before the unconditional ones.
        calls_per_step: The number of denoiser calls per step of a guided pipeline: 1 if both branches are rows of one
            call, 2 if each branch is a call, `None` if pipelines of the family differ.
        example_call: Returns a call like that of a pipeline, made of random values. If it is `None`, `edadm bench` can
            measure models of the family only through a run.
        layer_types: The types of layers that are quantized. Layers of other types are listed as left in float.
        float32_pipelines: The pipelines that sample in float32 only.
        one_prompt_pipelines: The pipelines that take one prompt and one image, and no lists of them.
        negative_prompt_pipelines: The pipelines that do not guide without a negative prompt. They get a single space.
        tiled_autoencoders: The classes of autoencoders that work in tiles only, so that tiling is turned on.
        call_arguments: Arguments of a pipeline's call that make all calls of the denoiser alike, such as one that turns
            a cache off. They are passed where the pipeline has a parameter of that name, and change no image.
        prepare: Gives all calls of a denoiser one form before it is recorded or reconstructed, if the denoiser treats
            prompts of different lengths differently. The predictions stay the same.

    Raises:
        TypeError: A field of names is one text, which happens when a tuple of one name lacks its comma.
    """

    name: str
    denoisers: tuple[str, ...]
    blocks: Mapping[str, UnitKind] | None = None
    embeddings: tuple[str, ...] = TIME_EMBEDDINGS
    block_lists: tuple[str, ...] = ("transformer_blocks", "blocks", "layers")
    sample_arguments: tuple[str, ...] = ("sample", "hidden_states", "x")
    timestep_arguments: tuple[str, ...] = TIMESTEP_ARGUMENTS
    shared_arguments: tuple[str, ...] = ("img_ids", "txt_ids")
    ragged_layers: tuple[str, ...] = ()
    joined_arguments: tuple[str, ...] = ()
    rows_second: tuple[str, ...] = ()
    masks: Mapping[str, str] = field(default_factory=dict)
    hiding_masks: Mapping[str, str] = field(default_factory=dict)
    conditional_first: tuple[str, ...] = ()
    calls_per_step: Literal[1, 2] | None = None
    example_call: Callable[[nn.Module, ExampleValues], Call] | None = None
    layer_types: tuple[type[nn.Module], ...] = (nn.Linear, nn.Conv2d)
    float32_pipelines: tuple[str, ...] = ()
    one_prompt_pipelines: tuple[str, ...] = ()
    negative_prompt_pipelines: tuple[str, ...] = ()
    tiled_autoencoders: tuple[str, ...] = ()
    call_arguments: Mapping[str, Any] = field(default_factory=dict)
    prepare: Callable[[nn.Module], None] | None = None

    def __post_init__(self) -> None:
        for each in fields(self):
            if each.name != "name" and isinstance(value := getattr(self, each.name), str):
                raise TypeError(
                    f"'{each.name}' of the family '{self.name}' is the text '{value}': a tuple needs a comma"
                )


UNDESCRIBED = DenoiserFamily("undescribed", ())
"""The family, with all defaults, of a denoiser that no other family names."""
