"""Measures how much each part of a quantized emoji model adds to the final distance to full precision.

    edadm collect --model emoji-dit && edadm select && edadm reconstruct --bits w4a8
    python benchmarks/emoji_parts.py --run runs/emoji-dit --bits w4a8 --out docs/data/emoji-parts.jsonl
    python benchmarks/emoji_parts.py --rows docs/data/emoji-parts.jsonl

One part of the denoiser at a time gets its full-precision weights back, while all inputs stay quantized. The
first rows have all weights or all inputs in full precision. A part is the layers with one task, or those of one block.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from study.rows_of_run import load_widths, print_table, rows_parser
from torch import Tensor, nn

from edadm_cli.quant.layers import QuantizedLayer, quantized_layers
from edadm_cli.quant.split_layer import SplitLayer

TASKS = {
    "embeddings of time and pooled text": r"time_embedding|timestep_embedder|text_embedder",
    "projections of the time embedding": r"time_emb_proj|norm1(_context)?\.linear|norm_out\.linear",
    "text keys and values": r"attn2\.to_[kv]",
    "attention of the text": r"add_[qkv]_proj|to_add_out",
    "feed-forward of the text": r"ff_context",
    "queries and keys": r"to_[qk]",
    "values": r"to_v",
    "attention output": r"to_out",
    "feed-forward, first": r"ff\.net\.0",
    "feed-forward, second": r"ff\.net\.2",
    "shortcuts": r"shortcut",
    "first convolutions of residual blocks": r"conv1",
    "second convolutions of residual blocks": r"conv2",
    "projections around transformers": r"proj_(in|out)",
    "changes of resolution": r"sampler",
    "first and last layer": r"conv_in|pos_embed|conv_out|context_embedder",
}


class FloatInput(nn.Module):
    """A quantized layer whose input is left in float."""

    def __init__(self, layer: QuantizedLayer) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        """Returns the product of `x` and the quantized weight."""
        return self.layer.operation(x, self.layer.weight.to(x.dtype), self.layer.bias)


class FloatWeight(nn.Module):
    """A quantized layer with its full-precision weight."""

    def __init__(self, layer: QuantizedLayer, weight: Tensor) -> None:
        super().__init__()
        self.layer, self.weight = layer, nn.Parameter(weight.detach(), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        """Returns the product of the quantized input and the full-precision weight."""
        quantizer = self.layer.input_quantizer
        return self.layer.operation(
            x if quantizer is None else quantizer.fake_quantize(x), self.weight, self.layer.bias
        )


def exact_weights(exact: nn.Module, quantized: nn.Module) -> dict[str, Tensor]:
    """Returns the full-precision weight of every quantized layer, or of its channel range, by the layer's name."""
    floats, layers = dict(exact.named_modules()), quantized_layers(quantized)
    weights = {name: floats[name].get_parameter("weight") for name in layers if name in floats}
    for name, module in quantized.named_modules():
        if isinstance(module, SplitLayer):
            names = [layer for layer in layers if layer.startswith(f"{name}.")]
            weights |= dict(zip(names, floats[name].get_parameter("weight").split(module.sizes, dim=1), strict=True))
    return weights


def parts_of(names: list[str]) -> dict[str, list[str]]:
    """Returns the layers of each part."""
    parts: dict[str, list[str]] = defaultdict(list)
    for name in names:
        task = next((task for task, pattern in TASKS.items() if re.search(pattern, name)), None)
        if task is not None:
            parts[task].append(name)
    for name in names:
        block = re.match(r"transformer_blocks\.\d+|down_blocks\.\d+|mid_block|up_blocks\.\d+", name)
        if block is not None:
            parts[f"`{block[0]}`"].append(name)
    return dict(parts)


@contextmanager
def replaced(model: nn.Module, names: list[str], make: Callable[[str], nn.Module]) -> Iterator[None]:
    """Puts other modules in place of the named ones while entered."""
    before = {name: model.get_submodule(name) for name in names}
    try:
        for name in names:
            model.set_submodule(name, make(name))
        yield
    finally:
        for name, module in before.items():
            model.set_submodule(name, module)


def measure(run: Path, bits: str, images: int, device: str) -> list[dict[str, Any]]:
    """Returns one row per part: its share of the weights, and the final relative L2 distances."""
    from study.emoji_judge import generate

    from edadm_cli.artifacts import RunFolder
    from edadm_cli.metrics.distances import relative_l2
    from edadm_cli.models.collected import CollectedRun

    collected, models = CollectedRun.open(RunFolder(run)), load_widths(run, ("", bits), device)
    exact, quantized = models[""], models[bits]
    net, layers = quantized.denoiser, quantized_layers(quantized.denoiser)
    weights = exact_weights(exact.denoiser, net)
    reference = generate(exact, collected, 0, images, images)[1]

    def row(part: str, names: list[str], make: Callable[[str], nn.Module]) -> dict[str, Any]:
        with replaced(net, names, make):
            distances = relative_l2(generate(quantized, collected, 0, images, images)[1], reference)
        share = sum(weights[name].numel() for name in names) / sum(weight.numel() for weight in weights.values())
        finals = {"final": float(distances.mean()), "median": float(distances.median())}
        return {"model": collected.entry.name, "bits": bits, "part": part, "weights": share, "images": images, **finals}

    def with_weight(name: str) -> nn.Module:
        return FloatWeight(layers[name], weights[name])

    rows = [row("nothing", [], with_weight), row("all inputs", list(layers), lambda name: FloatInput(layers[name]))]
    rows.append(row("all weights", list(layers), with_weight))
    return rows + [row(part, names, with_weight) for part, names in parts_of(list(layers)).items()]


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Returns one Markdown table per model and bit width."""
    lines: list[str] = []
    for model, bits in dict.fromkeys((row["model"], row["bits"]) for row in rows):
        lines += [
            "",
            f"### {model} {bits}",
            "",
            "| in full precision | share of the weights | final | median | change |",
        ]
        lines.append("|---|---|---|---|---|")
        chosen = [row for row in rows if (row["model"], row["bits"]) == (model, bits)]
        for row in chosen:
            change = row["final"] / chosen[0]["final"] - 1
            lines.append(
                f"| {row['part']} | {row['weights']:.1%} | {row['final']:.4f} | {row['median']:.4f} | {change:+.0%} |"
            )
    return "\n".join(lines)


def main() -> None:
    """Reads the command line and prints the table."""
    options = rows_parser(__doc__, bits="w4a8", images=64).parse_args()

    def measure_all() -> list[dict[str, Any]]:
        widths = options.bits.split(",")
        return [row for bits in widths for row in measure(options.run, bits, options.images, options.device)]

    print_table(options, measure_all, table)


if __name__ == "__main__":
    main()
