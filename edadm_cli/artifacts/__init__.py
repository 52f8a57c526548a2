"""Artifacts on disk: what a stage writes, how it is checked, and how it appears once complete."""

from edadm_cli.artifacts.artifact import Artifact, open_artifact
from edadm_cli.artifacts.build import Build
from edadm_cli.artifacts.files import explain_os_error, explained_os_errors, file_sha256, load_json, save_json
from edadm_cli.artifacts.manifest import Manifest, ModelRef, ParentRef, PayloadFile
from edadm_cli.artifacts.records import (
    CollectRecord,
    Coverage,
    Distance,
    Estimate,
    EvaluateRecord,
    ExportRecord,
    Loss,
    Metric,
    Parity,
    ReconstructRecord,
    ReportRecord,
    RunRecord,
    SampleRecord,
    SelectRecord,
    StageRecord,
)
from edadm_cli.artifacts.store import Plan, RunFolder
from edadm_cli.artifacts.tensors import TensorInfo, load_tensors, read_tensor_header, save_tensors

__all__ = [
    "Artifact",
    "Build",
    "CollectRecord",
    "Coverage",
    "Distance",
    "Estimate",
    "EvaluateRecord",
    "ExportRecord",
    "Loss",
    "Manifest",
    "Metric",
    "ModelRef",
    "ParentRef",
    "Parity",
    "PayloadFile",
    "Plan",
    "ReconstructRecord",
    "ReportRecord",
    "RunFolder",
    "RunRecord",
    "SampleRecord",
    "SelectRecord",
    "StageRecord",
    "TensorInfo",
    "explain_os_error",
    "explained_os_errors",
    "file_sha256",
    "load_json",
    "load_tensors",
    "open_artifact",
    "read_tensor_header",
    "save_json",
    "save_tensors",
]
