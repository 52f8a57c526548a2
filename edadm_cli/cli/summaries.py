"""Summarizes the record of a stage for people, by names and sentences in place of the keys of the JSON object."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

Record = Mapping[str, Any]
Rows = Iterator[tuple[str, str | list[str]]]
"""The name and the value of each row; a list has one item per line."""

_GIB = 1024.0


def is_summarized(result: Record) -> bool:
    """Returns whether `summary` knows the command of a record."""
    return result.get("command") in _OWN_ROWS


def summary(result: Record) -> Rows:
    """Yields the rows of a stage's summary: what was done, where the result is, and what it took."""
    status = str(result["status"]).replace("_", " ")
    planned = result["status"] == "planned"
    yield "Status", f"done in {duration(result['seconds'])}" if status == "done" else status
    if result.get("artifact"):
        yield "Folder", result["artifact"]
    needed, own_rows = _OWN_ROWS[result["command"]]
    if needed in result:
        yield from own_rows(result)
    if planned and result.get("estimate"):
        yield from costs(result["estimate"])
    elif status == "done":
        yield from _peaks(result)


def duration(seconds: float) -> str:
    """Returns a duration in seconds, in minutes from two minutes on, and in hours from two hours on."""
    if seconds < 120:
        return f"{seconds:.1f} s"
    return f"{seconds / 60:.1f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def size(mebibytes: float) -> str:
    """Returns a size in KiB, MiB or GiB, in three digits."""
    if mebibytes < 0.1:
        return f"{mebibytes * 1024:.3g} KiB"
    if mebibytes >= _GIB:
        return f"{mebibytes / _GIB:,.2f} GiB"
    return f"{mebibytes:,.0f} MiB" if mebibytes >= 100 else f"{mebibytes:.3g} MiB"


def distances(evaluation: Record) -> Rows:
    """Yields the distances of an evaluated export to full precision, by their names for people."""
    from edadm_cli.report.formats import label_of, metric_value

    for name, value in evaluation["distance_to_full_precision"].items():
        if value is not None:
            yield f"{label_of(name).label} against full precision", metric_value(name, value)


def sizes_on_disk(export: Record) -> Rows:
    """Yields the size of an export's denoiser and of its whole pipeline."""
    sizes, pipeline = export["size_mib"], export.get("pipeline")
    if sizes.get("ratio"):
        smaller, before = sizes["denoiser_fp32"] / sizes["ratio"], sizes["denoiser_fp32"]
        yield "Denoiser", f"{size(smaller)} on disk, {sizes['ratio']:.2f} times smaller than {size(before)} in float32"
    if pipeline:
        yield (
            "Pipeline",
            f"{size(pipeline['disk_mib'])} on disk instead of {size(pipeline['disk_before_mib'])};"
            f" weights of {size(pipeline['memory_mib'])} in memory instead of {size(pipeline['memory_before_mib'])}",
        )


def verdicts(*records: Record) -> Rows:
    """Yields one row with the sentences of all verdicts, one per line; nothing if there are none."""
    sentences = [sentence for record in records for sentence in record.get("verdict", ())]
    if sentences:
        yield "Verdict", sentences


def costs(estimate: Record) -> Rows:
    """Yields the rows of an estimate, without any for a stage that cannot be probed yet."""
    yield "Time", f"about {duration(estimate['seconds'])}"
    yield "Memory", f"{size(estimate['memory_mib'])} beyond the program itself"
    if estimate.get("host_memory_mib") is not None:
        yield "Host memory", size(estimate["host_memory_mib"])
    yield "Disk", size(estimate["disk_mib"])


def _peaks(result: Record) -> Rows:
    host, cuda = result.get("peak_memory_mib"), result.get("peak_cuda_memory_mib")
    if host is not None:
        yield "Peak memory", size(host) + (f", and {size(cuda)} on the GPU" if cuda is not None else "")


def _collect(result: Record) -> Rows:
    yield "Model", result["model"]
    yield "Trajectories", f"{result['num_trajectories']:,} of {result['num_steps']} steps each"


def _select(result: Record) -> Rows:
    yield "Strategy", result["strategy"]
    yield "Samples", _counts(result["counts"])
    for denoiser, counts in result.get("further_counts", {}).items():
        yield f"Samples of {denoiser}", _counts(counts)


def _counts(counts: Iterable[int]) -> str:
    numbers = list(counts)
    return f"{sum(numbers):,}, by step: {' '.join(map(str, numbers))}"


def _sensitivity(result: Record) -> Rows:
    yield "Layers", f"{result['layers']:,} measured"
    yield "Most sensitive", [f"{name}, {error:.3g}" for name, error in result["most_sensitive"].items()]


def _reconstruct(result: Record) -> Rows:
    coverage, loss = result["coverage"], result["loss"]
    yield "Bits, recipe", f"{result['bits']}, {result['recipe']}"
    kept = f", {coverage['kept']:,} left in float" if coverage["kept"] else ""
    yield "Layers", f"{coverage['quantized']:,} of {coverage['planned']:,} quantized{kept}; {result['units']:,} units"
    if loss["first"] is not None and loss["last"] is not None:
        yield "Loss", f"{loss['first']:.4g} with weights rounded to nearest, {loss['last']:.4g} with learned rounding"


def _export(result: Record) -> Rows:
    yield "Bits", result["bits"]
    yield from sizes_on_disk(result)
    for name, encoder in result.get("text_encoders", {}).items():
        error = "" if encoder["rel_l2"] is None else f"; relative L2 error of its output {encoder['rel_l2']:.2g}"
        yield name, f"8-bit weights, {size(encoder['size_mib'])} instead of {size(encoder['float_mib'])}{error}"
    yield "Check", _check(result["parity"])
    yield from verdicts(result)
    if result.get("engine"):
        engine = result["engine"]
        yield f"For {engine['name']}", f"{engine['artifact']}, {size(engine['size_mib'])}"


def _check(parity: Record) -> list[str]:
    if parity["images_bit_equal"]:
        sentences = ["The images before and after packing are equal."]
    else:
        sentences = [f"The latents before and after packing differ by {parity['latent_max_abs']:.2g} or less."]
    if parity.get("integer_rel_l2") is not None:
        sentences.append(
            f"No layer differs from exact integers by more than {parity['integer_rel_l2']:.2g}"
            f" ({parity['integer_bound']:.2g} is allowed)."
        )
    return sentences


def _evaluate(result: Record) -> Rows:
    yield "Bits", result["bits"]
    yield from distances(result)
    yield from verdicts(result)


def _sample(result: Record) -> Rows:
    yield "Images", list(result["images"])


def _report(result: Record) -> Rows:
    yield "Page", result["report"]


def _push(result: Record) -> Rows:
    files = result["files"]
    yield "Repository", result["url"] or result["repository"]
    yield f"{len(files)} files", [f"{name}, {size(length / 2**20)}" for name, length in files.items()]
    yield "Together", size(sum(files.values()) / 2**20)


_OWN_ROWS: dict[str, tuple[str, Callable[[Record], Rows]]] = {
    "collect": ("model", _collect),
    "select": ("strategy", _select),
    "sensitivity": ("layers", _sensitivity),
    "reconstruct": ("units", _reconstruct),
    "export": ("parity", _export),
    "evaluate": ("metrics", _evaluate),
    "sample": ("images", _sample),
    "report": ("report", _report),
    "push": ("repository", _push),
}
"""Maps a command to a key of its whole record, which a planned stage lacks, and to the rows that it adds."""
