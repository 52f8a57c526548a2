"""Maps the original tensor names of a denoiser, by which ComfyUI recognizes models, to those of diffusers.

A tensor of the original file consists of one or several tensors of diffusers, joined along the first dimension: query,
key and value are one matrix there. In some tensors the two halves are swapped: the scale and shift of an adaptive norm.

References:
    The names are those of the published checkpoints of Stable Diffusion, Stable Diffusion XL, Stable Diffusion 3,
    FLUX.1, Qwen-Image and Z-Image, as `diffusers.loaders.single_file_utils` reads them.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from edadm_cli.errors import InputError
from edadm_cli.models.checkpoints.names import level_of, unet_name

PREFIX = "model.diffusion_model."


@dataclass(frozen=True)
class Source:
    """The tensors of diffusers that an original tensor consists of.

    Attributes:
        names: Names in diffusers; the tensors are joined along their first dimension in this order.
        swaps_halves: Whether the first and the second half of the rows are swapped.
    """

    names: tuple[str, ...]
    swaps_halves: bool = False


Sources = dict[str, Source]
"""Maps an original name, without `PREFIX`, to its source in diffusers."""


def original_names(denoiser: nn.Module, names: Iterable[str]) -> Sources:
    """Returns the sources of the original tensors of a denoiser.

    Args:
        denoiser: The denoiser, quantized or not.
        names: The names of its tensors in diffusers, as a float denoiser has them.

    Raises:
        InputError: ComfyUI's names are not known for this class of denoiser, or for one of its tensors.
    """
    kind = type(denoiser).__name__
    if kind not in _KINDS:
        raise InputError(
            f"ComfyUI's names of a {kind} are not known here; the known denoisers are {', '.join(sorted(_KINDS))}.",
            hint="edadm export --engine onnxruntime writes a standard ONNX file of any denoiser",
        )
    return _KINDS[kind](denoiser, list(names))


def _unet(denoiser: nn.Module, names: list[str]) -> Sources:
    levels_with_attention = {level_of(name) for name in names if ".attentions." in name}
    config: Any = denoiser.config
    per_level = config.layers_per_block
    if not isinstance(per_level, int):
        raise InputError("ComfyUI reads UNets with the same number of residual blocks on every level.")
    sources: Sources = {}
    for name in names:
        try:
            original = unet_name(name, per_level, level_of(name) in levels_with_attention)
        except KeyError as error:
            raise InputError(f"ComfyUI has no name for the tensor '{name}' of this UNet.") from error
        sources[original] = Source((name,))
    return sources


def _renamed(rules: list[tuple[str, str]]) -> Callable[[str], str | None]:
    compiled = [(re.compile(pattern), replacement) for pattern, replacement in rules]

    def rename(stem: str) -> str | None:
        for pattern, replacement in compiled:
            if pattern.fullmatch(stem):
                return pattern.sub(replacement, stem)
        return None

    return rename


def _by_rules(
    names: list[str],
    rules: list[tuple[str, str]],
    joined: Sequence[tuple[str, str, tuple[str, ...]]],
    swapped: Callable[[str], bool] = lambda _: False,
) -> Sources:
    """Returns the sources that rules give for some names.

    Args:
        names: Names of diffusers.
        rules: Maps a pattern of a name without its last part to the original name.
        joined: Maps a pattern of the first of several joined modules to the original name and the last parts of the
            other modules' names.
        swapped: Returns whether a tensor's halves are swapped, by its name in diffusers.
    """
    rename, sources, used = _renamed(rules), Sources(), set[str]()
    present = set(names)
    for pattern, replacement, others in joined:
        for name in names:
            stem, _, leaf = name.rpartition(".")
            if re.fullmatch(pattern, stem) and leaf in ("weight", "bias"):
                parent = stem.rpartition(".")[0]
                parts = (name, *(f"{_resolve(parent, other)}.{leaf}" for other in others))
                missing = [part for part in parts if part not in present]
                if missing:
                    raise InputError(f"The denoiser has no tensor '{missing[0]}', which ComfyUI joins with '{name}'.")
                sources[f"{re.sub(pattern, replacement, stem)}.{leaf}"] = Source(parts)
                used.update(parts)
    for name in names:
        if name in used:
            continue
        stem, _, leaf = name.rpartition(".")
        original = rename(name) or ((renamed := rename(stem)) and f"{renamed}.{leaf}")
        if original is None:
            raise InputError(f"ComfyUI has no name for the tensor '{name}'.")
        sources[original] = Source((name,), swapped(name))
    return sources


def _resolve(parent: str, other: str) -> str:
    """Returns the name of a module beside another; `../name` is one level up."""
    while other.startswith("../"):
        parent, other = parent.rpartition(".")[0], other[3:]
    return f"{parent}.{other}"


_EMBEDDER = r"time_text_embed\.{}_embedder\.linear_{}"


def _flux(denoiser: nn.Module, names: list[str]) -> Sources:
    double, single = r"transformer_blocks\.(\d+)\.", r"single_transformer_blocks\.(\d+)\."
    rules = [
        (_EMBEDDER.format("timestep", 1), "time_in.in_layer"),
        (_EMBEDDER.format("timestep", 2), "time_in.out_layer"),
        (_EMBEDDER.format("text", 1), "vector_in.in_layer"),
        (_EMBEDDER.format("text", 2), "vector_in.out_layer"),
        (_EMBEDDER.format("guidance", 1), "guidance_in.in_layer"),
        (_EMBEDDER.format("guidance", 2), "guidance_in.out_layer"),
        ("context_embedder", "txt_in"),
        ("x_embedder", "img_in"),
        (double + r"norm1\.linear", r"double_blocks.\1.img_mod.lin"),
        (double + r"norm1_context\.linear", r"double_blocks.\1.txt_mod.lin"),
        (double + r"attn\.norm_q\.weight", r"double_blocks.\1.img_attn.norm.query_norm.scale"),
        (double + r"attn\.norm_k\.weight", r"double_blocks.\1.img_attn.norm.key_norm.scale"),
        (double + r"attn\.norm_added_q\.weight", r"double_blocks.\1.txt_attn.norm.query_norm.scale"),
        (double + r"attn\.norm_added_k\.weight", r"double_blocks.\1.txt_attn.norm.key_norm.scale"),
        (double + r"attn\.to_out\.0", r"double_blocks.\1.img_attn.proj"),
        (double + r"attn\.to_add_out", r"double_blocks.\1.txt_attn.proj"),
        (double + r"ff\.net\.0\.proj", r"double_blocks.\1.img_mlp.0"),
        (double + r"ff\.net\.2", r"double_blocks.\1.img_mlp.2"),
        (double + r"ff_context\.net\.0\.proj", r"double_blocks.\1.txt_mlp.0"),
        (double + r"ff_context\.net\.2", r"double_blocks.\1.txt_mlp.2"),
        (single + r"norm\.linear", r"single_blocks.\1.modulation.lin"),
        (single + r"attn\.norm_q\.weight", r"single_blocks.\1.norm.query_norm.scale"),
        (single + r"attn\.norm_k\.weight", r"single_blocks.\1.norm.key_norm.scale"),
        (single + "proj_out", r"single_blocks.\1.linear2"),
        ("norm_out.linear", "final_layer.adaLN_modulation.1"),
        ("proj_out", "final_layer.linear"),
    ]
    joined = [
        (double + r"attn\.to_q", r"double_blocks.\1.img_attn.qkv", ("to_k", "to_v")),
        (double + r"attn\.add_q_proj", r"double_blocks.\1.txt_attn.qkv", ("add_k_proj", "add_v_proj")),
        (single + r"attn\.to_q", r"single_blocks.\1.linear1", ("to_k", "to_v", "../proj_mlp")),
    ]
    return _by_rules(names, rules, joined, lambda name: name.startswith("norm_out.linear"))


def _sd3(denoiser: nn.Module, names: list[str]) -> Sources:
    block = r"transformer_blocks\.(\d+)\."
    to = r"joint_blocks.\1."
    rules = [
        (r"pos_embed\.pos_embed", "pos_embed"),
        (r"pos_embed\.proj", "x_embedder.proj"),
        (_EMBEDDER.format("timestep", 1), "t_embedder.mlp.0"),
        (_EMBEDDER.format("timestep", 2), "t_embedder.mlp.2"),
        (_EMBEDDER.format("text", 1), "y_embedder.mlp.0"),
        (_EMBEDDER.format("text", 2), "y_embedder.mlp.2"),
        ("context_embedder", "context_embedder"),
        (block + r"norm1\.linear", to + "x_block.adaLN_modulation.1"),
        (block + r"norm1_context\.linear", to + "context_block.adaLN_modulation.1"),
        (block + r"attn\.to_out\.0", to + "x_block.attn.proj"),
        (block + r"attn2\.to_out\.0", to + "x_block.attn2.proj"),
        (block + r"attn\.to_add_out", to + "context_block.attn.proj"),
        (block + r"attn(2?)\.norm_q", to + r"x_block.attn\2.ln_q"),
        (block + r"attn(2?)\.norm_k", to + r"x_block.attn\2.ln_k"),
        (block + r"attn\.norm_added_q", to + "context_block.attn.ln_q"),
        (block + r"attn\.norm_added_k", to + "context_block.attn.ln_k"),
        (block + r"ff\.net\.0\.proj", to + "x_block.mlp.fc1"),
        (block + r"ff\.net\.2", to + "x_block.mlp.fc2"),
        (block + r"ff_context\.net\.0\.proj", to + "context_block.mlp.fc1"),
        (block + r"ff_context\.net\.2", to + "context_block.mlp.fc2"),
        ("norm_out.linear", "final_layer.adaLN_modulation.1"),
        ("proj_out", "final_layer.linear"),
    ]
    joined = [
        (block + r"attn(2?)\.to_q", to + r"x_block.attn\2.qkv", ("to_k", "to_v")),
        (block + r"attn\.add_q_proj", to + "context_block.attn.qkv", ("add_k_proj", "add_v_proj")),
    ]
    config: Any = denoiser.config
    last = f"transformer_blocks.{config.num_layers - 1}.norm1_context.linear"
    return _by_rules(names, rules, joined, lambda name: name.startswith(("norm_out.linear", last)))


def _qwen_image(denoiser: nn.Module, names: list[str]) -> Sources:
    return {name: Source((name,)) for name in names}


def _z_image(denoiser: nn.Module, names: list[str]) -> Sources:
    rules = [
        (r"all_final_layer\.2-1\.(.+)", r"final_layer.\1"),
        (r"all_x_embedder\.2-1\.(.+)", r"x_embedder.\1"),
        (r"(.+\.attention)\.to_out\.0\.(.+)", r"\1.out.\2"),
        (r"(.+\.attention)\.norm_([qk])\.(.+)", r"\1.\2_norm.\3"),
        (r"(.+)", r"\1"),
    ]
    joined = [(r"(.+\.attention)\.to_q", r"\1.qkv", ("to_k", "to_v"))]
    return _by_rules(names, rules, joined)


_KINDS: dict[str, Callable[[nn.Module, list[str]], Sources]] = {
    "UNet2DConditionModel": _unet,
    "FluxTransformer2DModel": _flux,
    "SD3Transformer2DModel": _sd3,
    "QwenImageTransformer2DModel": _qwen_image,
    "ZImageTransformer2DModel": _z_image,
}
