"""NNCF: post-training quantization of the OpenVINO graph of the full-precision denoiser, which OpenVINO runs."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import torch

from edadm_cli.bench.contenders.base import Contender, Preparation
from edadm_cli.bench.spec import ContenderEnvironment, Spec, folder_mib
from edadm_cli.engines.base import EngineOptions
from edadm_cli.errors import UsageError


class Nncf(Contender):
    """INT8 with ranges that NNCF determines, from the same weights and the first of the same calls."""

    name = "nncf"
    packages = ("nncf", "openvino")

    def require(self, device: torch.device) -> None:
        """Refuses a GPU: OpenVINO runs the graph on the CPU."""
        super().require(device)
        if device.type != "cpu":
            raise UsageError("--against nncf compares on the CPU; this bench runs on a GPU.", hint="--against torchao")

    def prepare(self, context: Preparation) -> list[Spec]:
        """Quantizes the graph that the full-precision contender of OpenVINO runs."""
        os.environ.setdefault("NNCF_CI", "1")  # otherwise it sends usage reports, and waits for them without a network
        import nncf
        import openvino as ov
        from nncf.quantization.advanced_parameters import AdvancedQuantizationParameters
        from openvino._offline_transformations import apply_moc_transformations

        from edadm_cli.engines.openvino import files

        nncf.set_log_level("ERROR")
        source, folder = context.folder("openvino"), context.folder(self.name)
        graph, description = files.read(source)
        tensors = description.interface.tensors(*context.calls[0])
        shapes = {name: list(tensor.shape) for name, tensor in tensors.items()}
        graph.reshape(shapes)
        # the passes of `openvino.convert_model`, which halve the number of operations that NNCF searches for patterns
        apply_moc_transformations(graph, cf=False)
        # speed depends neither on the ranges nor on the biases, so one call suffices and biases are not corrected
        dataset = nncf.Dataset([{name: tensor.numpy() for name, tensor in tensors.items()}])
        quantized = nncf.quantize(
            graph,
            dataset,
            subset_size=1,
            model_type=nncf.ModelType.TRANSFORMER,
            advanced_parameters=AdvancedQuantizationParameters(disable_bias_correction=True),
        )
        folder.mkdir(parents=True)
        ov.save_model(quantized, folder / files.GRAPH_FILE, compress_to_fp16=False)
        description.model_copy(update={"shapes": tuple(map(tuple, shapes.values()))}).save(folder)
        return [
            Spec(
                name=f"{self.name} w8a8",
                engine=self.name,
                runs_on="openvino",
                dtype=context.dtype,
                bits="w8a8",
                compiled=True,
                folder=folder,
                size_mib=folder_mib(folder),
            )
        ]

    def load(self, spec: Spec, environment: ContenderEnvironment) -> Callable[..., Any]:
        """Compiles the graph as it is: NNCF's users have none of the forms that this package's engine gives a graph."""
        from edadm_cli.engines.openvino import files
        from edadm_cli.engines.openvino.denoiser import OpenVinoDenoiser

        assert spec.folder is not None
        graph, description = files.read(spec.folder)
        options = EngineOptions(torch.device(environment.device), getattr(torch, spec.dtype), environment.threads)
        interface, layers, shapes = description.interface, description.layers, description.shapes
        return OpenVinoDenoiser(graph, interface, layers, options, shapes, is_rewritten=False)
