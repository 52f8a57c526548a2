"""Adds metrics to an evaluation whose other settings are the same, so that nothing of it is lost."""

from __future__ import annotations

from edadm_cli.artifacts import Artifact, BuildSpec, Evaluation, RunFolder, open_artifact
from edadm_cli.artifacts.store import is_artifact_name
from edadm_cli.config import EvaluateConfig
from edadm_cli.errors import EdadmError
from edadm_cli.evaluate.plan import EvaluationPlan
from edadm_cli.evaluate.request import resolve
from edadm_cli.metrics.paired import ALWAYS
from edadm_cli.metrics.registry import in_order


def spec_of(evaluation: EvaluationPlan) -> BuildSpec:
    """Returns the specification of the artifact of an evaluation."""
    request = evaluation.request
    config = request.config
    return BuildSpec(
        kind="evaluate",
        name=config.name,
        config={**config.identity_fields(), **request.identity_fields(), **evaluation.identity_fields()},
        seed=config.seed,
        parents=(request.export,),
        model=request.model,
    )


def metrics_with_stored(config: EvaluateConfig, run: RunFolder) -> tuple[tuple[str, ...], bool]:
    """Decides the metrics of an evaluation, given the one that the run holds already.

    Args:
        config: The settings that are asked for.
        run: The run folder.

    Returns:
        The value of `metrics`, and whether the evaluation of the run is to be replaced. If that has all metrics that
        are asked for, the value is its own. If it lacks some and differs in nothing else, the value names the metrics
        of both. Otherwise the value is `config.metrics`, and nothing is to be replaced.
    """
    as_asked = config.metrics, False
    stored = _stored(config, run)
    if stored is None:
        return as_asked
    of_stored = stored.manifest.config.get("metrics")
    named = tuple(map(str, of_stored)) if isinstance(of_stored, list) else ()
    if named == config.metrics:
        return as_asked
    try:
        earlier = EvaluationPlan(resolve(config.model_copy(update={"metrics": named}), run))
        asked = EvaluationPlan(resolve(config, run)).selection.selected
        skipped = Evaluation.load(stored).skipped
    except EdadmError:  # the evaluation itself reports what is wrong
        return as_asked
    if spec_of(earlier).identity != stored.identity:
        return as_asked
    computed = earlier.selection.selected.keys() - skipped.keys()
    if asked.keys() <= (computed if config.metrics else computed | skipped.keys()):
        return named, False
    if not config.metrics:
        return (), computed <= asked.keys()
    return tuple(in_order((computed | asked.keys()) - ALWAYS)), True


def _stored(config: EvaluateConfig, run: RunFolder) -> Artifact | None:
    """Returns the evaluation of that name; `None` if there is none, if there can be none, or if it is damaged."""
    if not is_artifact_name(config.name) or not run.has("evaluate", config.name):
        return None
    try:
        return open_artifact(run.path("evaluate", config.name), "evaluate")
    except EdadmError:
        return None
