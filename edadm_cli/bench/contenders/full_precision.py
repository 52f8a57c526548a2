"""The contenders at full precision: all that a user could run instead of a quantized denoiser."""

from __future__ import annotations

import torch

from edadm_cli.bench.contenders.base import Contender, Preparation
from edadm_cli.bench.spec import TORCH, Spec, folder_mib, placed
from edadm_cli.bench.verdict import FP32_EAGER
from edadm_cli.engines.base import EngineOptions, FileEngine
from edadm_cli.engines.registry import engine as engine_of


class TorchFloat(Contender):
    """Torch at full precision: float32 in eager mode; half precision eager, in CUDA graphs, and compiled."""

    name = TORCH

    def prepare(self, context: Preparation) -> list[Spec]:
        """Returns the forms for the device; if it has no fast half-precision type, the compiled form is float32."""
        is_cuda, half = context.device.type == "cuda", context.half
        forms = [(FP32_EAGER, "float32", False, False)]
        if half is not None:
            forms.append((f"torch {half}", half, False, False))
            forms += [(f"torch {half}, CUDA graph", half, False, True)] if is_cuda else []
        if context.compiled:
            kind = half or "float32"
            graph = ", CUDA graph" if is_cuda else ""
            forms.append((f"torch {kind}, compiled{graph}", kind, True, is_cuda))
        return [
            Spec(
                name=name,
                engine=self.name,
                runs_on=TORCH,
                dtype=dtype,
                bits=None,
                compiled=compiled,
                folder=context.denoiser_folder,
                size_mib=context.float_mib(dtype),
                graphs=graphs,
                channels_last=dtype != "float32",
                denoiser_class=context.facts.class_path,
            )
            for name, dtype, compiled, graphs in forms
        ]


class OpenVinoFloat(Contender):
    """The CPU engine at full precision, which separates the gain of the engine from the gain of integers."""

    name = "openvino"

    def prepare(self, context: Preparation) -> list[Spec]:
        """Converts the denoiser once; on other devices this contender is absent and OpenVINO need not be installed."""
        if context.device.type != "cpu":
            return []
        engine = engine_of(self.name)
        assert isinstance(engine, FileEngine)
        folder = context.folder(self.name)
        args, kwargs = placed(context.calls[0], context.device, torch.float32)
        engine.save(context.denoiser(), args, kwargs, EngineOptions(context.device), folder)
        types = ["float32", *([context.half] if context.half is not None else [])]
        return [
            Spec(
                name=f"{self.name} {dtype}",
                engine=self.name,
                runs_on=self.name,
                dtype=dtype,
                bits=None,
                compiled=True,
                folder=folder,
                size_mib=folder_mib(folder),
            )
            for dtype in types
        ]
