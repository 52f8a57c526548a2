"""The record that says everything this tool knows about one family of denoisers."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from torch import nn

from edadm_cli.models.families.values import ExampleValues

Call = tuple[tuple[Any, ...], dict[str, Any]]
UnitKind = Literal["residual", "transformer", "attention", "layer"]

TIMESTEP_ARGUMENTS = ("timestep", "timesteps", "t")
TIME_EMBEDDINGS = ("TimestepEmbedding", "CombinedTimestepLabelEmbeddings", "CombinedTimestepTextProjEmbeddings")


@dataclass(frozen=True)
class DenoiserFamily:
    """What this tool knows about the denoisers of one family; every field but the first two has a default that works.

    Attributes:
        name: A short name for messages, such as `flux`.
        denoisers: Names of the denoiser classes that belong to the family. Subclasses belong to it too.
        blocks: The classes that are reconstructed as one unit, with the kind of each. `None` takes diffusers' own
            `_repeated_blocks`, and where a model has none, the classes of its repeated module lists.
        embeddings: Classes of modules that embed the timestep and other vectors per image. Their layers count as the
            edge of the network.
        block_lists: Names of the attribute that holds the blocks in order, the best first. The middle block of the
            first list that exists gives the mid-block feature; a `mid_block` and then the longest list of blocks
            serve where none of these lists exists.
        sample_arguments: Names under which the noisy sample enters `forward`.
        timestep_arguments: Names under which the timestep enters `forward`.
        shared_arguments: Names of arguments that hold one tensor for all images, whatever its size.
        ragged_layers: Parts of the names of layers that multiply tokens of all images at once, in a number that differs
            from image to image. They are left in float.
        joined_arguments: Names of arguments that may hold several entries per image one after the other in their first
            dimension, such as a prompt for each frame of a clip.
        rows_second: Names of arguments whose second dimension counts the rows, such as text states of several layers,
            with shape `(layers, R, *)`.
        masks: Names of mask arguments, each with the argument whose second dimension it masks. A pipeline that leaves
            such a mask out means that everything counts; a mask of ones is recorded then, so that all calls have one
            form and prompts of different length can be padded.
        conditional_first: Pipelines that put the conditional rows of a guided call before the unconditional ones.
        calls_per_step: How often a guided pipeline calls the denoiser per step: 1 where both branches are rows of one
            call, 2 where each branch is a call, `None` where pipelines of the family differ.
        example_call: Makes the call that a pipeline would make, from random values. `None`: there is none, and
            `edadm bench` measures models of the family by a run only.
        layer_types: Types of layers that are quantized. Layers of another type are listed as left in float.
        float32_pipelines: Pipelines that sample in float32 only.
        one_prompt_pipelines: Pipelines that take one prompt and image, and no lists of them.
        prepare: Makes all calls of a denoiser alike before it is recorded or reconstructed, where it treats prompts of
            different length differently; the predictions stay the same.
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
    conditional_first: tuple[str, ...] = ()
    calls_per_step: Literal[1, 2] | None = None
    example_call: Callable[[nn.Module, ExampleValues], Call] | None = None
    layer_types: tuple[type[nn.Module], ...] = (nn.Linear, nn.Conv2d)
    float32_pipelines: tuple[str, ...] = ()
    one_prompt_pipelines: tuple[str, ...] = ()
    prepare: Callable[[nn.Module], None] | None = None


UNDESCRIBED = DenoiserFamily("undescribed", ())
"""The family of a denoiser that nobody described: the defaults."""
