"""The measurement itself: parity of every bit width, then all contenders in turns."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import nn

from edadm_cli.artifacts import (
    Contender,
    EngineParity,
    Latency,
    LayerRow,
    PipelineTime,
    QuantizedFacts,
)
from edadm_cli.bench.contender import Call, Running, Spec, placed
from edadm_cli.bench.floats import openvino_specs, torch_specs
from edadm_cli.bench.kinds import rows_by_kind
from edadm_cli.bench.machine import machine_facts
from edadm_cli.bench.memory import give_back_memory, require_memory
from edadm_cli.bench.peak import measure_peaks
from edadm_cli.bench.peers import NNCF, TORCHAO, nncf_spec, torchao_spec
from edadm_cli.bench.quantized import Prepared, check_prediction, coverage_of, prepare
from edadm_cli.bench.request import Request
from edadm_cli.bench.rounds import summarize, time_in_rounds
from edadm_cli.bench.subject import ExportSubject
from edadm_cli.bench.verdict import FP32_EAGER, headline, speedup_of
from edadm_cli.bench.worker import RemoteRunning
from edadm_cli.bench.workload import WorkItem, workload
from edadm_cli.engines.base import FLOAT, CompiledDenoiser, EngineOptions, FileEngine
from edadm_cli.engines.files import engine_artifact
from edadm_cli.progress import Reporter
from edadm_cli.quant.layers import quantized_layers

Participant = Running | RemoteRunning


class Measurement:
    """Prepares and times the contenders of a request; a context manager that ends their processes.

    Args:
        request: What is measured.
        scratch: Folder for files that are not kept.
        reporter: Told of the progress.
    """

    def __init__(self, request: Request, scratch: Path, reporter: Reporter) -> None:
        self.request, self.scratch, self.reporter = request, scratch, reporter
        self._setting = request.setting
        self._calls: dict[int, list[Call]] = {}
        self._work: list[WorkItem] = []
        self._floats: list[Spec] = []
        self._prepared: list[Prepared] = []
        self._peers: list[Spec] = []
        self._running: dict[str, Participant] = {}

    def __enter__(self) -> Measurement:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        for participant in self._running.values():
            if isinstance(participant, RemoteRunning):
                participant.close()
        self._running.clear()

    @property
    def _first(self) -> int:
        return self.request.config.batch_sizes[0]

    def prepare(self) -> None:
        """Write the contenders' files, and compare every layer of the quantized ones with exact integers.

        Raises:
            EdadmError: A layer of the engine is out of bound.
        """
        request, config = self.request, self.request.config
        torch.set_num_threads(request.threads)
        denoiser = request.subject.full_precision()
        for batch in config.batch_sizes:
            self._calls[batch] = request.subject.calls(denoiser, batch, config.size, config.seed)
        self._work = _work_of(denoiser, self._calls[self._first][0])
        folder = self.scratch / "float"
        denoiser.save_pretrained(folder)  # type: ignore[operator]
        self._floats = torch_specs(denoiser, folder, request.device, request.half, config.compiled)
        call = self._calls[self._first][0]
        openvino = openvino_specs(denoiser, call, self._setting, request.half, self.scratch / "openvino")
        self._floats += openvino
        num_weights = sum(parameter.numel() for parameter in denoiser.parameters())
        del denoiser
        give_back_memory()
        for peer in config.against:
            if peer == NNCF:
                calls = self._calls[self._first]
                place = self.scratch / NNCF
                self._peers.append(nncf_spec(self.scratch / "openvino", calls, request.dtype, place))
            elif peer == TORCHAO:
                half = request.half or "float32"
                self._peers.append(torchao_spec(folder, half, num_weights, request.device.type == "cuda"))
        for bits in config.bits:
            self._prepared.append(self._prepare_quantized(bits))
            give_back_memory()

    def measure(self) -> dict[str, Any]:
        """Compare predictions, time everything, and put the result together.

        Raises:
            EdadmError: The prediction of an engine is out of bound.
        """
        request, config = self.request, self.request.config
        self._start()
        parities = self._check_predictions()
        peaks = self._measure_peaks()
        times = self._time(self._first, config.rounds)
        latencies = {name: summarize(found) for name, found in times.items()}
        memories = {name: participant.memory() for name, participant in self._running.items()}
        rates = self._throughput(latencies)
        drawn = self._draw() if config.pipeline else {}
        contenders = [
            _contender(self._running[name], latencies[name], memories[name], rates[name], drawn.get(name))
            for name in self._running
        ]
        facts = self._quantized_facts(contenders, parities, peaks)
        main = facts[str(config.bits[0])]
        peers = [contender for contender in contenders if contender.engine in config.against]
        speedups = [found.speedup for found in facts.values()]
        return {
            "subject": request.subject.title,
            "bits": [str(width) for width in config.bits],
            "machine": machine_facts(request.device, request.threads),
            "engine": request.engine.name,
            "coverage": main.coverage.model_dump(),
            "parity": main.parity.model_dump(),
            "contenders": [contender.model_dump() for contender in contenders],
            "speedup": main.speedup.model_dump(),
            "by_bits": {name: found.model_dump() for name, found in facts.items()},
            "peak_tops": peaks,
            "headline": headline(speedups, contenders, peers),
        }

    def _prepare_quantized(self, bits: Any) -> Prepared:
        request = self.request
        folder = self.scratch / f"{bits}-{request.engine.name}"
        if isinstance(request.subject, ExportSubject) and isinstance(request.engine, FileEngine):
            export = request.subject.exports[str(bits)]
            folder = engine_artifact(request.run, export, request.engine, self.reporter).path
        denoiser = request.subject.quantized(bits)
        with self.reporter.task(f"Parity {bits}", len(quantized_layers(denoiser))) as advance:
            return prepare(
                request.engine,
                denoiser,
                bits,
                self._calls[self._first][0],
                self._setting,
                getattr(torch, request.dtype),
                folder,
                advance,
            )

    def _start(self) -> None:
        sources = {prepared.spec.name: prepared.source for prepared in self._prepared}
        specs = [*self._floats, *(prepared.spec for prepared in self._prepared), *self._peers]
        with self.reporter.task("Loading", len(specs)) as advance:
            for spec in specs:
                self.reporter.note(f"loading {spec.name}")
                self._running[spec.name] = self._participant(spec, sources.get(spec.name))
                advance(1)

    def _participant(self, spec: Spec, source: Callable[[], CompiledDenoiser] | None) -> Participant:
        if self._setting.is_alone and source is None:
            require_memory(spec.name, spec.size_mib)
            return RemoteRunning(spec, self._setting, self._calls)
        if self._setting.is_alone:
            self.reporter.warn(f"{spec.name} has no files and runs in the program itself: its memory is not measured.")
        return Running(spec, replace(self._setting, is_alone=False), self._calls, source)

    def _check_predictions(self) -> dict[str, EngineParity]:
        reference = self._running[FP32_EAGER].prediction
        return {
            str(prepared.spec.bits): check_prediction(
                prepared, self.request.engine, self._running[prepared.spec.name].prediction, reference
            )
            for prepared in self._prepared
        }

    def _time(self, batch: int, rounds: int) -> dict[str, list[float]]:
        with self.reporter.task(f"Timing, batch {batch}", rounds * len(self._running)) as advance:
            return time_in_rounds(self._running, batch, rounds, advance)

    def _throughput(self, latencies: Mapping[str, Latency]) -> dict[str, dict[str, float]]:
        """Rows a second at every batch size, from medians."""
        config = self.request.config
        rates = {name: {str(self._first): 1e3 * self._first / latencies[name].median} for name in self._running}
        for batch in config.batch_sizes[1:]:
            for name, times in self._time(batch, max(1, config.rounds // 2)).items():
                rates[name][str(batch)] = 1e3 * batch / summarize(times).median
        return rates

    def _draw(self) -> dict[str, PipelineTime]:
        request = self.request.subject.pipeline(self.request.config.seed)
        found = {}
        with self.reporter.task("Drawing", len(self._running)) as advance:
            for name, participant in self._running.items():
                seconds, in_denoiser = participant.draw(request)
                share = in_denoiser / seconds
                found[name] = PipelineTime(seconds=seconds, num_steps=request.num_steps, denoiser_share=share)
                advance(1)
        return found

    def _measure_peaks(self) -> dict[str, float]:
        device, dtypes = self.request.device, tuple(dict.fromkeys(["float32", self.request.half or "float32"]))
        threads = self.request.threads if device.type == "cpu" else None
        rest = getattr(torch, self.request.dtype) if device.type == "cuda" else torch.float32
        return measure_peaks(self.request.engine, EngineOptions(device, rest, threads), dtypes)

    def _quantized_facts(
        self, contenders: list[Contender], parities: Mapping[str, EngineParity], peaks: Mapping[str, float]
    ) -> dict[str, QuantizedFacts]:
        by_name = {contender.name: contender for contender in contenders}
        facts = {}
        for prepared in self._prepared:
            participant, bits = self._running[prepared.spec.name], str(prepared.spec.bits)
            coverage, layers = coverage_of(participant.layers(), self.request.engine)
            self._warn_of_floats(bits, layers)
            facts[bits] = QuantizedFacts(
                coverage=coverage,
                parity=parities[bits],
                speedup=speedup_of(by_name[prepared.spec.name], contenders),
                layers=layers,
                by_kind=rows_by_kind(participant.profile(self._first), self._work, peaks),
            )
        return facts

    def _warn_of_floats(self, bits: str, layers: Sequence[LayerRow]) -> None:
        planned = [row for row in layers if row.planned != FLOAT]
        floats = [row for row in planned if row.precision != "int8"]
        if floats:
            self.reporter.warn(
                f"{bits}: not in integers on {self.request.engine.name}: {len(floats)} of {len(planned)} planned"
                f" layers, such as '{floats[0].name}' ({floats[0].reason}); by_bits.{bits}.layers has every reason."
            )


def _contender(
    participant: Participant,
    latency: Latency,
    memory: tuple[float | None, float | None],
    rates: dict[str, float],
    pipeline: PipelineTime | None,
) -> Contender:
    spec = participant.spec
    return Contender(
        name=spec.name,
        engine=spec.engine,
        dtype=spec.dtype,
        bits=spec.bits,
        compiled=spec.compiled,
        latency_ms=latency,
        peak_memory_mib=memory[0],
        load_memory_mib=memory[1],
        load_seconds=participant.load_seconds,
        size_mib=spec.size_mib,
        throughput=rates,
        pipeline=pipeline,
    )


def _work_of(denoiser: nn.Module, call: Call) -> list[WorkItem]:
    """What a call multiplies, from shapes alone."""
    kind: Any = type(denoiser)
    with torch.device("meta"):
        shell = kind.from_config(getattr(denoiser, "config"))  # noqa: B009 - diffusers' own attribute
    args, kwargs = placed(call, torch.device("meta"), torch.float32)
    return workload(shell, args, kwargs)
