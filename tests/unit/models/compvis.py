"""CompVis checkpoints written by hand: tiny models of the real kinds, their names, and what they compute.

`unet_state` and `autoencoder_state` name the weights of a diffusers module as CompVis does, by walking its blocks.
`run_unet` and `run_decoder` compute from such names alone, as the CompVis code does, without any module of diffusers.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

State = dict[str, Tensor]
UNET, STAGE = "model.diffusion_model.", "first_stage_model."


def unet_state(unet: Any, heads_first: bool = True) -> State:
    """Weights of a UNet under their CompVis names."""
    state: State = {}

    def put(place: str, module: nn.Module) -> None:
        state.update({f"{UNET}{place}.{name}": tensor.clone() for name, tensor in module.state_dict().items()})

    def put_resnet(place: str, block: Any) -> None:
        put(f"{place}.in_layers.0", block.norm1)
        put(f"{place}.in_layers.2", block.conv1)
        put(f"{place}.emb_layers.1", block.time_emb_proj)
        put(f"{place}.out_layers.0", block.norm2)
        put(f"{place}.out_layers.3", block.conv2)
        if block.conv_shortcut is not None:
            put(f"{place}.skip_connection", block.conv_shortcut)

    def put_attention(place: str, block: Any) -> None:
        if type(block).__name__ == "Transformer2DModel":
            put(place, block)
            return
        put(f"{place}.norm", block.group_norm)
        for leaf in ("weight", "bias"):
            thirds = [getattr(layer, leaf) for layer in (block.to_q, block.to_k, block.to_v)]
            if heads_first:
                by_head = [third.reshape(block.heads, -1, *third.shape[1:]) for third in thirds]
                joined = torch.cat(by_head, dim=1).flatten(0, 1)
            else:
                joined = torch.cat(thirds)
            state[f"{UNET}{place}.qkv.{leaf}"] = joined[:, :, None] if leaf == "weight" else joined
        state[f"{UNET}{place}.proj_out.weight"] = block.to_out[0].weight[:, :, None].clone()
        state[f"{UNET}{place}.proj_out.bias"] = block.to_out[0].bias.clone()

    put("time_embed.0", unet.time_embedding.linear_1)
    put("time_embed.2", unet.time_embedding.linear_2)
    if getattr(unet, "add_embedding", None) is not None:
        put("label_emb.0.0", unet.add_embedding.linear_1)
        put("label_emb.0.2", unet.add_embedding.linear_2)
    put("input_blocks.0.0", unet.conv_in)
    number = 0
    for block in unet.down_blocks:
        for index, resnet in enumerate(block.resnets):
            number += 1
            put_resnet(f"input_blocks.{number}.0", resnet)
            if hasattr(block, "attentions"):
                put_attention(f"input_blocks.{number}.1", block.attentions[index])
        for sampler in block.downsamplers or ():
            number += 1
            if hasattr(sampler, "norm1"):
                put_resnet(f"input_blocks.{number}.0", sampler)
            else:
                put(f"input_blocks.{number}.0.op", sampler.conv)
    put_resnet("middle_block.0", unet.mid_block.resnets[0])
    put_attention("middle_block.1", unet.mid_block.attentions[0])
    put_resnet("middle_block.2", unet.mid_block.resnets[1])
    number = -1
    for block in unet.up_blocks:
        has_attention = hasattr(block, "attentions")
        for index, resnet in enumerate(block.resnets):
            number += 1
            put_resnet(f"output_blocks.{number}.0", resnet)
            if has_attention:
                put_attention(f"output_blocks.{number}.1", block.attentions[index])
        for sampler in block.upsamplers or ():
            place = f"output_blocks.{number}.{1 + has_attention}"
            if hasattr(sampler, "norm1"):
                put_resnet(place, sampler)
            else:
                put(f"{place}.conv", sampler.conv)
    put("out.0", unet.conv_norm_out)
    put("out.2", unet.conv_out)
    return state


def autoencoder_state(autoencoder: Any) -> State:
    """Weights of a VQ or KL autoencoder under their CompVis names."""
    state: State = {}

    def put(place: str, module: nn.Module) -> None:
        state.update({f"{STAGE}{place}.{name}": tensor.clone() for name, tensor in module.state_dict().items()})

    def put_resnet(place: str, block: Any) -> None:
        for name in ("norm1", "conv1", "norm2", "conv2"):
            put(f"{place}.{name}", getattr(block, name))
        if block.conv_shortcut is not None:
            put(f"{place}.nin_shortcut", block.conv_shortcut)

    def put_attention(place: str, block: Any) -> None:
        put(f"{place}.norm", block.group_norm)
        layers = {"q": block.to_q, "k": block.to_k, "v": block.to_v, "proj_out": block.to_out[0]}
        for name, layer in layers.items():
            state[f"{STAGE}{place}.{name}.weight"] = layer.weight[:, :, None, None].clone()
            state[f"{STAGE}{place}.{name}.bias"] = layer.bias.clone()

    for half, blocks, way in (("encoder", "down_blocks", "down"), ("decoder", "up_blocks", "up")):
        part = getattr(autoencoder, half)
        put(f"{half}.conv_in", part.conv_in)
        put(f"{half}.norm_out", part.conv_norm_out)
        put(f"{half}.conv_out", part.conv_out)
        put_resnet(f"{half}.mid.block_1", part.mid_block.resnets[0])
        put_attention(f"{half}.mid.attn_1", part.mid_block.attentions[0])
        put_resnet(f"{half}.mid.block_2", part.mid_block.resnets[1])
        levels = list(getattr(part, blocks))
        for index, block in enumerate(levels):
            level = index if way == "down" else len(levels) - 1 - index
            for number, resnet in enumerate(block.resnets):
                put_resnet(f"{half}.{way}.{level}.block.{number}", resnet)
            for number, attention in enumerate(getattr(block, "attentions", ())):
                put_attention(f"{half}.{way}.{level}.attn.{number}", attention)
            for sampler in getattr(block, f"{way}samplers") or ():
                put(f"{half}.{way}.{level}.{way}sample.conv", sampler.conv)
    put("quant_conv", autoencoder.quant_conv)
    put("post_quant_conv", autoencoder.post_quant_conv)
    if hasattr(autoencoder, "quantize"):
        put("quantize", autoencoder.quantize)
    return state


def open_clip_state(encoder: Any, prefix: str) -> State:
    """Weights of a CLIP text encoder under the names of open_clip."""
    model = getattr(encoder, "text_model", encoder)
    state: State = {
        "token_embedding.weight": model.embeddings.token_embedding.weight,
        "positional_embedding": model.embeddings.position_embedding.weight,
        "ln_final.weight": model.final_layer_norm.weight,
        "ln_final.bias": model.final_layer_norm.bias,
    }
    if hasattr(encoder, "text_projection"):
        state["text_projection"] = encoder.text_projection.weight.T
    for number, layer in enumerate(model.encoder.layers):
        place, attention = f"transformer.resblocks.{number}", layer.self_attn
        parts = {
            "ln_1": layer.layer_norm1,
            "ln_2": layer.layer_norm2,
            "attn.out_proj": attention.out_proj,
            "mlp.c_fc": layer.mlp.fc1,
            "mlp.c_proj": layer.mlp.fc2,
        }
        for name, module in parts.items():
            state.update({f"{place}.{name}.{leaf}": tensor for leaf, tensor in module.state_dict().items()})
        thirds = (attention.q_proj, attention.k_proj, attention.v_proj)
        for leaf in ("weight", "bias"):
            state[f"{place}.attn.in_proj_{leaf}"] = torch.cat([getattr(third, leaf) for third in thirds])
    return {prefix + name: tensor.detach().clone() for name, tensor in state.items()}


def with_schedule(state: State) -> State:
    """Returns the constants and leftovers of training that real checkpoints have besides the weights."""
    extra = {name: torch.linspace(0, 1, 10) for name in ("betas", "alphas_cumprod", "posterior_mean_coef1")}
    loss = {f"{STAGE}loss.discriminator.main.0.weight": torch.zeros(2, 3, 1, 1), "logvar": torch.zeros(10)}
    return {**state, **extra, **loss}


def ema_of(state: State) -> State:
    """Moving averages of a denoiser's weights: names lose their dots."""
    averages = {
        "model_ema." + name.removeprefix("model.").replace(".", ""): tensor.clone()
        for name, tensor in state.items()
        if name.startswith(UNET)
    }
    return {**averages, "model_ema.decay": torch.tensor(0.9999), "model_ema.num_updates": torch.tensor(10)}


class _Reader:
    """Layers by name."""

    def __init__(self, state: Mapping[str, Tensor], prefix: str, eps: float) -> None:
        self.state, self.prefix, self.eps = state, prefix, eps

    def has(self, place: str) -> bool:
        return any(name.startswith(f"{self.prefix}{place}.") for name in self.state)

    def get(self, place: str, leaf: str = "weight") -> Tensor:
        return self.state[f"{self.prefix}{place}.{leaf}"]

    def linear(self, place: str, x: Tensor) -> Tensor:
        bias = self.state.get(f"{self.prefix}{place}.bias")
        return F.linear(x, self.get(place), bias)

    def conv(self, place: str, x: Tensor, stride: int = 1, padding: int | None = None) -> Tensor:
        weight = self.get(place)
        return F.conv2d(
            x, weight, self.get(place, "bias"), stride, weight.shape[-1] // 2 if padding is None else padding
        )

    def norm(self, place: str, x: Tensor, eps: float | None = None) -> Tensor:
        return F.group_norm(x, 32, self.get(place), self.get(place, "bias"), eps or self.eps)


def run_unet(
    state: State,
    x: Tensor,
    t: int,
    *,
    num_heads: int | None,
    head_size: int | None,
    levels: int,
    blocks: int,
    **more: Any,
) -> Tensor:
    """The noise that a CompVis UNet predicts, from its checkpoint's tensors.

    `more` has `context` (states with shape `(N, L, D)`), `scale_shift`, `heads_first`.
    """
    read = _Reader(state, UNET, 1e-5)
    width = read.get("input_blocks.0.0").shape[0]
    frequencies = torch.exp(-math.log(10000) * torch.arange(width // 2) / (width // 2))
    angles = torch.full((len(x), 1), float(t)) * frequencies
    emb = torch.cat([angles.cos(), angles.sin()], dim=1)
    emb = read.linear("time_embed.2", F.silu(read.linear("time_embed.0", emb)))

    def resnet(place: str, h: Tensor, resample: str | None = None) -> Tensor:
        inner = F.silu(read.norm(f"{place}.in_layers.0", h))
        if resample == "down":
            inner, h = F.avg_pool2d(inner, 2), F.avg_pool2d(h, 2)
        if resample == "up":
            inner, h = F.interpolate(inner, scale_factor=2.0), F.interpolate(h, scale_factor=2.0)
        inner = read.conv(f"{place}.in_layers.2", inner)
        added = read.linear(f"{place}.emb_layers.1", F.silu(emb))[:, :, None, None]
        if more.get("scale_shift"):
            scale, shift = added.chunk(2, dim=1)
            inner = F.silu(read.norm(f"{place}.out_layers.0", inner) * (1 + scale) + shift)
        else:
            inner = F.silu(read.norm(f"{place}.out_layers.0", inner + added))
        inner = read.conv(f"{place}.out_layers.3", inner)
        return inner + (read.conv(f"{place}.skip_connection", h) if read.has(f"{place}.skip_connection") else h)

    def attention(place: str, h: Tensor) -> Tensor:
        if read.has(f"{place}.transformer_blocks"):
            return _spatial_transformer(read, place, h, more["context"], num_heads or 1)
        n, channels, height, width_ = h.shape
        heads = num_heads or channels // (head_size or channels)
        flat = read.norm(f"{place}.norm", h).reshape(n, channels, -1)
        qkv = F.conv1d(flat, read.get(f"{place}.qkv"), read.get(f"{place}.qkv", "bias"))
        size = channels // heads
        if more.get("heads_first", True):
            q, k, v = qkv.reshape(n * heads, 3 * size, -1).split(size, dim=1)
        else:
            q, k, v = (third.reshape(n * heads, size, -1) for third in qkv.chunk(3, dim=1))
        root = size**-0.25
        weights = torch.einsum("bct,bcs->bts", q * root, k * root).softmax(dim=-1)
        mixed = torch.einsum("bts,bcs->bct", weights, v).reshape(n, channels, -1)
        out = F.conv1d(mixed, read.get(f"{place}.proj_out"), read.get(f"{place}.proj_out", "bias"))
        return h + out.reshape(n, channels, height, width_)

    def block(place: str, h: Tensor, way: str) -> Tensor:
        """Returns the state of one input or output block; `way` names a residual block without a skip input."""
        for index in range(3):
            inner = f"{place}.{index}"
            if read.has(f"{inner}.in_layers"):
                is_sampler = (way == "down" and place in downs) or (way == "up" and index > 0)
                h = resnet(inner, h, way if is_sampler else None)
            elif read.has(f"{inner}.norm"):
                h = attention(inner, h)
            elif read.has(f"{inner}.op"):
                h = read.conv(f"{inner}.op", h, stride=2, padding=1)
            elif read.has(f"{inner}.conv"):
                h = read.conv(f"{inner}.conv", F.interpolate(h, scale_factor=2.0))
        return h

    downs = {f"input_blocks.{(level + 1) * (blocks + 1)}" for level in range(levels - 1)}
    h = read.conv("input_blocks.0.0", x)
    skips, number = [h], 1
    while read.has(f"input_blocks.{number}"):
        h = block(f"input_blocks.{number}", h, "down")
        skips.append(h)
        number += 1
    h = resnet("middle_block.0", h)
    h = attention("middle_block.1", h)
    h = resnet("middle_block.2", h)
    for number in range(len(skips)):
        h = block(f"output_blocks.{number}", torch.cat([h, skips.pop()], dim=1), "up")
    return read.conv("out.2", F.silu(read.norm("out.0", h)))


def run_decoder(state: State, z: Tensor, levels: int, blocks: int) -> Tensor:
    """The image that a CompVis first stage decodes; latents of a VQ model are set to their nearest codes first."""
    read = _Reader(state, STAGE, 1e-6)
    if read.has("quantize.embedding"):
        codes = read.get("quantize.embedding")
        nearest = torch.cdist(z.movedim(1, -1).reshape(-1, codes.shape[1]), codes).argmin(dim=1)
        z = codes[nearest].reshape(z.movedim(1, -1).shape).movedim(-1, 1)

    def resnet(place: str, h: Tensor) -> Tensor:
        inner = read.conv(f"{place}.conv1", F.silu(read.norm(f"{place}.norm1", h)))
        inner = read.conv(f"{place}.conv2", F.silu(read.norm(f"{place}.norm2", inner)))
        return inner + (read.conv(f"{place}.nin_shortcut", h) if read.has(f"{place}.nin_shortcut") else h)

    def attention(place: str, h: Tensor) -> Tensor:
        normed = read.norm(f"{place}.norm", h)
        q, k, v = (read.conv(f"{place}.{name}", normed).flatten(2) for name in "qkv")
        weights = (q.transpose(1, 2) @ k * q.shape[1] ** -0.5).softmax(dim=-1)
        mixed = (v @ weights.transpose(1, 2)).reshape(h.shape)
        return h + read.conv(f"{place}.proj_out", mixed)

    h = read.conv("decoder.conv_in", read.conv("post_quant_conv", z))
    h = resnet("decoder.mid.block_2", attention("decoder.mid.attn_1", resnet("decoder.mid.block_1", h)))
    for level in reversed(range(levels)):
        for number in range(blocks + 1):
            h = resnet(f"decoder.up.{level}.block.{number}", h)
            if read.has(f"decoder.up.{level}.attn.{number}"):
                h = attention(f"decoder.up.{level}.attn.{number}", h)
        if level > 0:
            h = read.conv(f"decoder.up.{level}.upsample.conv", F.interpolate(h, scale_factor=2.0))
    return read.conv("decoder.conv_out", F.silu(read.norm("decoder.norm_out", h)))


def _spatial_transformer(read: _Reader, place: str, h: Tensor, context: Tensor, num_heads: int) -> Tensor:
    n, channels, height, width = h.shape
    x = read.conv(f"{place}.proj_in", read.norm(f"{place}.norm", h, eps=1e-6))
    x = x.flatten(2).transpose(1, 2)  # [N, HW, C]
    block = f"{place}.transformer_blocks.0"

    def layer_norm(name: str) -> Tensor:
        return F.layer_norm(x, x.shape[-1:], read.get(f"{block}.{name}"), read.get(f"{block}.{name}", "bias"))

    def attend(name: str, queries: Tensor, keys: Tensor) -> Tensor:
        q = read.linear(f"{block}.{name}.to_q", queries)
        k, v = (read.linear(f"{block}.{name}.{part}", keys) for part in ("to_k", "to_v"))
        q, k, v = (t.unflatten(-1, (num_heads, -1)).transpose(1, 2) for t in (q, k, v))
        weights = (q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5).softmax(dim=-1)
        return read.linear(f"{block}.{name}.to_out.0", (weights @ v).transpose(1, 2).flatten(2))

    normed = layer_norm("norm1")
    x = x + attend("attn1", normed, normed)
    x = x + attend("attn2", layer_norm("norm2"), context)
    value, gate = read.linear(f"{block}.ff.net.0.proj", layer_norm("norm3")).chunk(2, dim=-1)
    x = x + read.linear(f"{block}.ff.net.2", value * F.gelu(gate))
    x = x.transpose(1, 2).reshape(n, channels, height, width)
    return h + read.conv(f"{place}.proj_out", x)
