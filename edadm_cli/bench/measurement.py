"""Measures the contenders of a bench: first the parity of every bit width, then all times, in rounds."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
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
from edadm_cli.bench.contenders import base
from edadm_cli.bench.contenders.base import DenoiserFacts, Preparation
from edadm_cli.bench.contenders.registry import FLOATS, peers, prepare_specs
from edadm_cli.bench.kinds import rows_by_kind
from edadm_cli.bench.machine import machine_facts
from edadm_cli.bench.memory import give_back_memory
from edadm_cli.bench.participants import Participant, Participants, reason_of_error
from edadm_cli.bench.parts import Parts
from edadm_cli.bench.peak import measure_peaks
from edadm_cli.bench.quantized import Prepared, check_prediction, coverage_of, prepare
from edadm_cli.bench.request import BenchRequest
from edadm_cli.bench.rounds import is_unsteady, summarize
from edadm_cli.bench.spec import Call, Spec, placed
from edadm_cli.bench.subject import ExportSubject, sample_of
from edadm_cli.bench.verdict import FP32_EAGER, headline, speedup_of
from edadm_cli.bench.workload import WorkItem, workload
from edadm_cli.engines.base import FLOAT, EngineOptions, FileEngine, is_quantized
from edadm_cli.engines.files import engine_artifact
from edadm_cli.errors import InputError
from edadm_cli.progress import Reporter
from edadm_cli.quant.layers import quantized_layers


class Measurement:
    """Prepares and times the contenders of a request; a context manager that ends their processes.

    Args:
        request: What is measured.
        scratch: Folder for temporary files.
        reporter: Receives progress and warnings.
    """

    def __init__(self, request: BenchRequest, scratch: Path, reporter: Reporter) -> None:
        self.request, self.scratch, self.reporter = request, scratch, reporter
        self._environment = request.environment
        self._calls: dict[int, list[Call]] = {}
        self._work: list[WorkItem] = []
        self._specs: list[Spec] = []
        self._prepared: list[Prepared] = []
        self._not_prepared: dict[str, str] = {}
        self._participants: Participants | None = None
        self._parts = Parts(reporter)

    def __enter__(self) -> Measurement:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._participants is not None:
            self._participants.close()

    @property
    def _first(self) -> int:
        return self.request.config.batch_sizes[0]

    def prepare(self) -> None:
        """Writes the contenders' files, and compares every layer of the quantized ones with exact integers.

        Raises:
            EdadmError: A layer of the engine exceeds its bound.
            InputError: The denoiser cannot be called with samples of this size.
        """
        config = self.request.config
        context = self._prepare_full_precision()
        for contender in FLOATS:
            self._specs += self._prepare_contender(contender, context)
        peer_specs = [spec for name in config.against for spec in self._prepare_contender(peers()[name], context)]
        give_back_memory()
        for bits in config.bits:
            self._prepared.append(self._prepare_quantized(bits, context.denoiser))
            give_back_memory()
        self._specs += [*(prepared.spec for prepared in self._prepared), *peer_specs]

    def measure(self) -> dict[str, Any]:
        """Compares predictions, times all contenders, and returns the fields of a `BenchResult`.

        Raises:
            EdadmError: The prediction of an engine exceeds its bound.
        """
        request, config = self.request, self.request.config
        participants = self._started()
        with self._parts.measured("compare predictions"):
            parities = self._check_predictions(participants)
        with self._parts.measured("measure peaks"):
            peaks = self._measure_peaks()
        with self._parts.measured("time the contenders"):
            times = participants.time(self._first, config.rounds)
        latencies = {name: summarize(group) for name, group in times.items()}
        self._warn_of_a_busy_machine(latencies)
        memories = participants.each(lambda participant: participant.memory())
        rates = self._throughput(participants, latencies)
        images = self._time_images(participants) if config.pipeline else {}
        contenders = [
            _contender(participants[name], latencies[name], memories[name], rates[name], images.get(name))
            for name in participants
        ]
        with self._parts.measured("profile"):
            facts = self._quantized_facts(participants, contenders, parities, peaks)
        main = facts[str(config.bits[0])]
        against = [contender for contender in contenders if contender.engine in config.against]
        speedups = [facts_of_bits.speedup for facts_of_bits in facts.values()]
        left_out = {**self._not_prepared, **participants.left_out}
        return {
            "subject": request.subject.title,
            "bits": [str(width) for width in config.bits],
            "machine": machine_facts(request.device, request.threads),
            "engine": request.engine.name,
            "coverage": main.coverage.model_dump(),
            "parity": main.parity.model_dump(),
            "contenders": [contender.model_dump() for contender in contenders],
            "left_out": left_out,
            "speedup": main.speedup.model_dump(),
            "by_bits": {name: facts_of_bits.model_dump() for name, facts_of_bits in facts.items()},
            "peak_tops": peaks,
            "headline": headline(speedups, contenders, against, left_out),
            "part_seconds": self._parts.seconds,
        }

    def _prepare_full_precision(self) -> Preparation:
        """Makes the calls and saves the denoiser at full precision, and returns what contenders are prepared from."""
        request, config, folder = self.request, self.request.config, self.scratch / "float"
        with self._parts.measured("build the denoiser"):
            denoiser = request.subject.full_precision()
        with self._parts.measured("save the denoiser"):
            for batch in config.batch_sizes:
                self._calls[batch] = request.subject.calls(denoiser, batch, config.size, config.seed)
            self._work = _work_of(denoiser, request.engine.computed_call(denoiser, *self._calls[self._first][0]))
            denoiser.save_pretrained(folder)  # type: ignore[operator]
            facts = DenoiserFacts.of(denoiser)
            del denoiser
            give_back_memory()
        return Preparation(
            facts=facts,
            denoiser_folder=folder,
            scratch=self.scratch,
            calls=self._calls[self._first],
            environment=self._environment,
            dtype=request.dtype,
            half=request.half,
            compiled=config.compiled,
        )

    def _prepare_contender(self, contender: base.Contender, context: Preparation) -> list[Spec]:
        """Returns the forms of a contender, or none if its preparation raises an error; it is then left out."""
        try:
            with self._parts.measured(f"prepare {contender.name}"):
                return prepare_specs(contender, context)
        except Exception as error:
            if contender.name == self.request.engine.name:
                raise  # an engine that cannot convert the model cannot run it quantized either
            self._not_prepared[contender.name] = reason_of_error(error)
            self.reporter.warn(f"{contender.name} is left out: {self._not_prepared[contender.name]}.")
            return []

    def _prepare_quantized(self, bits: Any, full: Callable[[], nn.Module]) -> Prepared:
        request = self.request
        folder = self.scratch / f"{bits}-{request.engine.name}"
        if isinstance(request.subject, ExportSubject) and isinstance(request.engine, FileEngine):
            export = request.subject.exports[str(bits)]
            folder = engine_artifact(request.run, export, request.engine, self.reporter).path
        with self._parts.measured(f"quantize to {bits}"):
            denoiser = request.subject.quantized(bits, full)
        number = len(quantized_layers(denoiser))
        with self._parts.measured(f"prepare {bits}"), self.reporter.task(f"Parity {bits}", number) as advance:
            return prepare(
                request.engine,
                denoiser,
                partial(request.subject.quantized, bits, full),
                bits,
                self._calls[self._first][0],
                replace(self._options(getattr(torch, request.dtype)), attention=request.config.attention),
                folder,
                advance,
            )

    def _started(self) -> Participants:
        sources = {prepared.spec.name: prepared.source for prepared in self._prepared}
        required = {FP32_EAGER, *sources}
        participants = Participants(self._environment, self._calls, required, self.reporter)
        self._participants = participants
        with self.reporter.task("Loading", len(self._specs)) as advance:
            for spec in self._specs:
                with self._parts.measured(f"load {spec.name}"):
                    participants.start(spec, sources.get(spec.name))
                advance(1)
        return participants

    def _check_predictions(self, participants: Participants) -> dict[str, EngineParity]:
        reference = participants[FP32_EAGER].prediction
        return {
            str(prepared.spec.bits): check_prediction(
                prepared, self.request.engine, participants[prepared.spec.name].prediction, reference
            )
            for prepared in self._prepared
        }

    def _warn_of_a_busy_machine(self, latencies: Mapping[str, Latency]) -> None:
        unsteady = {name: latency for name, latency in latencies.items() if is_unsteady(latency)}
        if unsteady:
            name, latency = max(unsteady.items(), key=lambda item: item[1].max / item[1].min)
            self.reporter.warn(
                f"The calls of {len(unsteady)} of {len(latencies)} contenders differ too much for a verdict: those of"
                f" {name} took {latency.min:.3g} to {latency.max:.3g} ms. Other work kept the machine busy; measure"
                " again when it is idle."
            )

    def _throughput(self, participants: Participants, latencies: Mapping[str, Latency]) -> dict[str, dict[str, float]]:
        """Returns the rows per second of each contender at every batch size, from median times."""
        config = self.request.config
        rates = {name: {str(self._first): 1e3 * self._first / latencies[name].median} for name in participants}
        for batch in config.batch_sizes[1:]:
            for name, times in participants.time(batch, max(1, config.rounds // 2)).items():
                rates[name][str(batch)] = 1e3 * batch / summarize(times).median
        return rates

    def _time_images(self, participants: Participants) -> dict[str, PipelineTime]:
        cache = self.request.config.cache
        request = replace(self.request.subject.pipeline(self.request.config.seed), cache=cache)

        def timed(participant: Participant) -> PipelineTime:
            time = participant.time_image(request)
            if time.not_cached is not None:
                self.reporter.warn(
                    f"The image of {participant.spec.name} is timed without the cache: {time.not_cached}"
                )
            return PipelineTime(
                seconds=time.seconds,
                num_steps=request.num_steps,
                denoiser_share=time.in_denoiser / time.seconds,
                cache=None if time.not_cached is not None else cache,
            )

        with self.reporter.task("Generating images", len(participants)) as advance:
            return participants.each(timed, advance)

    def _measure_peaks(self) -> dict[str, float]:
        dtypes = tuple(dict.fromkeys(["float32", self.request.half or "float32"]))
        is_cuda = self.request.device.type == "cuda"
        rest = getattr(torch, self.request.dtype) if is_cuda else torch.float32
        return measure_peaks(self.request.engine, self._options(rest), dtypes)

    def _options(self, rest_dtype: torch.dtype) -> EngineOptions:
        """Returns the options of the engine on the device of the bench."""
        device = self.request.device
        return EngineOptions(device, rest_dtype, self.request.threads if device.type == "cpu" else None)

    def _quantized_facts(
        self,
        participants: Participants,
        contenders: list[Contender],
        parities: Mapping[str, EngineParity],
        peaks: Mapping[str, float],
    ) -> dict[str, QuantizedFacts]:
        by_name = {contender.name: contender for contender in contenders}
        facts = {}
        for prepared in self._prepared:
            participant, bits = participants[prepared.spec.name], str(prepared.spec.bits)
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
        floats = [row for row in planned if not is_quantized(row.precision)]
        if floats:
            self.reporter.warn(
                f"{bits}: not, or only partly, in integers on {self.request.engine.name}: {len(floats)} of"
                f" {len(planned)} planned layers, such as '{floats[0].name}' ({floats[0].reason});"
                f" by_bits.{bits}.layers has every reason."
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
    """Returns the products of a call, from shapes alone.

    Raises:
        InputError: The denoiser cannot be called with a sample of this size.
    """
    kind: Any = type(denoiser)
    with torch.device("meta"):
        shell = kind.from_config(getattr(denoiser, "config"))  # noqa: B009 - diffusers' own attribute
    args, kwargs = placed(call, torch.device("meta"), torch.float32)
    try:
        return workload(shell, args, kwargs)
    except (RuntimeError, ValueError) as error:
        shape = tuple(sample_of(denoiser, call).shape)
        raise InputError(
            f"{type(denoiser).__name__} cannot be called with a sample of shape {shape}: "
            f"{' '.join(str(error).split()).removesuffix('.')}.",
            hint="--size N or HxW, with sides that fit the denoiser",
        ) from error
