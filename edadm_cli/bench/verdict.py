"""Turns measured times into speed-ups and a summary in words."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from edadm_cli.artifacts import Contender, Speedup
from edadm_cli.errors import EdadmError

FP32_EAGER = "torch float32"
_LEVEL = 0.02
"""Medians whose ratio is closer to 1 than this are called level."""
_WORTHWHILE = 1.1


def speedup_of(contender: Contender, contenders: Sequence[Contender]) -> Speedup:
    """Returns the speed-ups of a contender: the median time of floating point divided by its own.

    `vs_best_float` compares with the fastest contender at full precision, on whatever engine.

    Raises:
        EdadmError: float32 in eager torch was not measured.
    """
    floats = [other for other in contenders if other.bits is None]
    eager = next((other for other in floats if other.name == FP32_EAGER), None)
    if eager is None:
        raise EdadmError("There is no full-precision contender to compare with.")
    best = min(floats, key=lambda other: other.latency_ms.median)
    median = contender.latency_ms.median
    return Speedup(
        contender=contender.name,
        vs_fp32_eager=eager.latency_ms.median / median,
        vs_best_float=best.latency_ms.median / median,
        best_float=best.name,
    )


def headline(
    speedups: Sequence[Speedup],
    contenders: Sequence[Contender],
    peers: Sequence[Contender],
    left_out: Mapping[str, str] | None = None,
) -> str:
    """Returns a sentence or two about each quantized contender, which say so if it is slower.

    Args:
        speedups: The speed-ups of the quantized contenders.
        contenders: All contenders.
        peers: The contenders of other tools. Integer ones are compared at their own bit width, float8 with every one.
        left_out: Contenders that could not be measured, with the reason.
    """
    by_name = {contender.name: contender for contender in contenders}
    sentences = []
    for speedup in speedups:
        ours = by_name[speedup.contender]
        bits = (ours.bits or "").upper()
        sentences.append(
            f"{bits} on {ours.engine} takes {_ms(ours.latency_ms.median)} per call:"
            f" {_versus(speedup.vs_best_float)} the best floating point here ({speedup.best_float}), and"
            f" {_versus(speedup.vs_fp32_eager)} float32 in eager torch."
        )
        for peer in peers:
            if peer.bits in (ours.bits, "float8"):
                ratio = peer.latency_ms.median / ours.latency_ms.median
                sentences.append(f"It is {_versus(ratio)} {peer.name}.")
                if ratio < 1 - _LEVEL:
                    sentences.append(f"{peer.name} wins here.")
        if speedup.vs_best_float < 1 - _LEVEL:
            sentences.append(f"{bits} loses here: floating point is faster.")
        elif speedup.vs_best_float < _WORTHWHILE:
            sentences.append(f"{bits} gains little speed here: less than {_WORTHWHILE} times.")
    sentences += [f"Left out: {name} ({reason})." for name, reason in (left_out or {}).items()]
    return " ".join(sentences)


def _versus(ratio: float) -> str:
    if abs(ratio - 1) < _LEVEL:
        return "level with"
    return f"{ratio:.2f} times as fast as" if ratio > 1 else f"{1 / ratio:.2f} times slower than"


def _ms(value: float) -> str:
    return f"{value / 1000:.2f} s" if value >= 1000 else f"{value:.3g} ms"
