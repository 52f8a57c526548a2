"""The weights of transformers under the names that their authors publish them in, as single files have them."""

from __future__ import annotations

import torch
from torch import Tensor, nn

State = dict[str, Tensor]

_EMBEDDERS = {
    "time_text_embed.timestep_embedder": ("time_in", "t_embedder"),
    "time_text_embed.text_embedder": ("vector_in", "y_embedder"),
    "time_text_embed.guidance_embedder": ("guidance_in", ""),
}
_FLUX_DOUBLE = {
    "norm1.linear": "img_mod.lin",
    "norm1_context.linear": "txt_mod.lin",
    "attn.to_out.0": "img_attn.proj",
    "attn.to_add_out": "txt_attn.proj",
    "ff.net.0.proj": "img_mlp.0",
    "ff.net.2": "img_mlp.2",
    "ff_context.net.0.proj": "txt_mlp.0",
    "ff_context.net.2": "txt_mlp.2",
}
_FLUX_NORMS = {
    "attn.norm_q": "img_attn.norm.query_norm",
    "attn.norm_k": "img_attn.norm.key_norm",
    "attn.norm_added_q": "txt_attn.norm.query_norm",
    "attn.norm_added_k": "txt_attn.norm.key_norm",
}
_SD3_BLOCK = {
    "norm1.linear": "x_block.adaLN_modulation.1",
    "norm1_context.linear": "context_block.adaLN_modulation.1",
    "attn.to_out.0": "x_block.attn.proj",
    "attn.to_add_out": "context_block.attn.proj",
    "attn2.to_out.0": "x_block.attn2.proj",
    "attn.norm_q": "x_block.attn.ln_q",
    "attn.norm_k": "x_block.attn.ln_k",
    "attn.norm_added_q": "context_block.attn.ln_q",
    "attn.norm_added_k": "context_block.attn.ln_k",
    "attn2.norm_q": "x_block.attn2.ln_q",
    "attn2.norm_k": "x_block.attn2.ln_k",
    "ff.net.0.proj": "x_block.mlp.fc1",
    "ff.net.2": "x_block.mlp.fc2",
    "ff_context.net.0.proj": "context_block.mlp.fc1",
    "ff_context.net.2": "context_block.mlp.fc2",
}


def flux_state(transformer: nn.Module) -> State:
    """Returns the weights of a FluxTransformer2DModel under the names of Black Forest Labs."""
    weights = {name: tensor.detach() for name, tensor in transformer.state_dict().items()}
    state = _ends(weights, ("img_in", "txt_in", "final_layer.adaLN_modulation.1", "final_layer.linear"))
    state |= _embedders(weights, 0, ("in_layer", "out_layer"))
    for index in range(len(transformer.transformer_blocks)):
        old, new = f"transformer_blocks.{index}.", f"double_blocks.{index}."
        state |= _renamed(weights, old, new, _FLUX_DOUBLE)
        for kind in ("weight", "bias"):
            state[f"{new}img_attn.qkv.{kind}"] = _joined(weights, old, ("to_q", "to_k", "to_v"), kind)
            state[f"{new}txt_attn.qkv.{kind}"] = _joined(weights, old, ("add_q_proj", "add_k_proj", "add_v_proj"), kind)
        for name, other in _FLUX_NORMS.items():
            state[f"{new}{other}.scale"] = weights[f"{old}{name}.weight"]
    for index in range(len(transformer.single_transformer_blocks)):
        old, new = f"single_transformer_blocks.{index}.", f"single_blocks.{index}."
        state |= _renamed(weights, old, new, {"norm.linear": "modulation.lin", "proj_out": "linear2"})
        for kind in ("weight", "bias"):
            heads = _joined(weights, old, ("to_q", "to_k", "to_v"), kind)
            state[f"{new}linear1.{kind}"] = torch.cat([heads, weights[f"{old}proj_mlp.{kind}"]])
        for name, other in (("norm_q", "query_norm"), ("norm_k", "key_norm")):
            state[f"{new}norm.{other}.scale"] = weights[f"{old}attn.{name}.weight"]
    return state


def sd3_state(transformer: nn.Module) -> State:
    """Returns the weights of an SD3Transformer2DModel under the names of Stability AI."""
    weights = {name: tensor.detach() for name, tensor in transformer.state_dict().items()}
    state = _ends(weights, ("", "context_embedder", "final_layer.adaLN_modulation.1", "final_layer.linear"))
    state |= _embedders(weights, 1, ("mlp.0", "mlp.2"))
    state |= _renamed(weights, "pos_embed.", "x_embedder.", {"proj": "proj"})
    state["pos_embed"] = weights["pos_embed.pos_embed"]
    last = len(transformer.transformer_blocks) - 1
    for index in range(last + 1):
        old, new = f"transformer_blocks.{index}.", f"joint_blocks.{index}."
        state |= _renamed(weights, old, new, _SD3_BLOCK)
        for kind in ("weight", "bias"):
            state[f"{new}x_block.attn.qkv.{kind}"] = _joined(weights, old, ("to_q", "to_k", "to_v"), kind)
            context = _joined(weights, old, ("add_q_proj", "add_k_proj", "add_v_proj"), kind)
            state[f"{new}context_block.attn.qkv.{kind}"] = context
            if f"{old}attn2.to_q.{kind}" in weights:
                second = _joined(weights, old, ("to_q", "to_k", "to_v"), kind, "attn2")
                state[f"{new}x_block.attn2.qkv.{kind}"] = second
            if index == last:  # its context has a scale and a shift only, in the other order
                key = f"{new}context_block.adaLN_modulation.1.{kind}"
                state[key] = _swapped(state[key])
    return state


def _ends(weights: State, names: tuple[str, str, str, str]) -> State:
    """Returns the first and the last layers, whose scale and shift are in the other order."""
    layers = dict(zip(("x_embedder", "context_embedder", "norm_out.linear", "proj_out"), names, strict=True))
    state = {
        f"{new}.{kind}": weights[f"{old}.{kind}"] for old, new in layers.items() if new for kind in ("weight", "bias")
    }
    return state | {f"{names[2]}.{kind}": _swapped(weights[f"norm_out.linear.{kind}"]) for kind in ("weight", "bias")}


def _embedders(weights: State, which: int, layers: tuple[str, str]) -> State:
    state: State = {}
    for old, names in _EMBEDDERS.items():
        for number, layer in enumerate(layers, start=1):
            state |= _renamed(weights, f"{old}.", f"{names[which]}.", {f"linear_{number}": layer})
    return state


def _renamed(weights: State, old: str, new: str, names: dict[str, str]) -> State:
    return {
        f"{new}{other}.{kind}": weights[f"{old}{name}.{kind}"]
        for name, other in names.items()
        for kind in ("weight", "bias")
        if f"{old}{name}.{kind}" in weights
    }


def _joined(weights: State, block: str, names: tuple[str, ...], kind: str, attention: str = "attn") -> Tensor:
    return torch.cat([weights[f"{block}{attention}.{name}.{kind}"] for name in names])


def _swapped(tensor: Tensor) -> Tensor:
    return torch.cat(tensor.chunk(2)[::-1])
