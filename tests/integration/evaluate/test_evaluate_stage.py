"""`edadm evaluate` on tiny pipelines."""

from __future__ import annotations

import importlib.metadata
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from edadm_cli import plugins
from edadm_cli.artifacts import Artifact, EvaluateRecord, RunFolder, load_tensors, save_tensors
from edadm_cli.cli.app import main
from edadm_cli.config import BitWidth, EvaluateConfig
from edadm_cli.errors import InputError, UsageError
from edadm_cli.estimates import evaluate as evaluate_estimates
from edadm_cli.evaluate import images as images_module
from edadm_cli.evaluate import stage
from edadm_cli.metrics import registry
from edadm_cli.models.loaded import LoadedModel
from edadm_cli.models.loading import load_model
from edadm_cli.models.pipeline_calls.sampling import Samples, sample
from edadm_cli.models.pipeline_calls.seeds import EVALUATION, image_seed
from edadm_cli.progress import SilentReporter

Exporter = Callable[[RunFolder, float], Artifact]
BITS = BitWidth(weight=4, activation=8)
DIGITS_METRICS = (
    "frechet_distance",
    "spatial_frechet_distance",
    "kernel_distance",
    "classifier_score",
    "precision",
    "recall",
    "prompt_accuracy",
)


def _config(**fields: Any) -> EvaluateConfig:
    return EvaluateConfig(**{"bits": BITS, "num_images": 12, "batch_size": 5, "device": "cpu", **fields})


def _figures(record: EvaluateRecord) -> dict[str, Any]:
    fields = record.model_dump()
    return {key: fields[key] for key in ("metrics", "full_precision", "distance_to_full_precision")}


def test_every_metric_names_its_features_and_number_of_images(text_run: RunFolder) -> None:
    reporter = SilentReporter()
    record = stage.run(_config(), text_run, reporter=reporter)
    assert record.status == "done"
    assert tuple(record.metrics) == tuple(record.full_precision) == DIGITS_METRICS
    for metric in (*record.metrics.values(), *record.full_precision.values()):
        assert metric.features.startswith("digits/")
        assert metric.num_images == 12
    assert any("frechet_distance of 12 images in 96 features" in warning for warning in record.warnings)
    assert 0 < record.distance_to_full_precision.latent_rel_l2 < 1
    again = stage.run(_config(), text_run)
    assert again.status == "up_to_date"
    assert again.warnings == record.warnings
    assert _figures(again) == _figures(record)


def test_the_artifact_holds_what_a_page_shows(text_run: RunFolder) -> None:
    stage.run(_config(), text_run)
    artifact = text_run.open("evaluate", "w4a8")
    assert not list(artifact.path.glob(images_module.BATCH_PATTERN))
    result = artifact.json("evaluation.json")
    assert [entry["seed"] for entry in result["shown"]] == [image_seed(0, i, EVALUATION) for i in range(10)]
    distances = artifact.json("distances.json")
    assert np.mean(distances["psnr_db"]) == pytest.approx(result["distance_to_full_precision"]["psnr_db"])
    reference = load_tensors(text_run.path("evaluate", "full-precision") / "batch-00000.safetensors")["images"]
    shown = np.asarray(Image.open(artifact.file(result["shown"][2]["full_precision"])).convert("L"))
    np.testing.assert_array_equal(shown, reference[2, 0].numpy())
    assert Image.open(artifact.file(result["grid"])).width > 10 * 96


def test_distances_follow_from_the_two_pipelines_seed_by_seed(pixel_run: RunFolder) -> None:
    record = stage.run(_config(), pixel_run)
    assert "prompt_accuracy" not in record.metrics
    seeds = [image_seed(0, index, EVALUATION) for index in range(12)]

    def latents(folder: Path) -> torch.Tensor:
        model = load_model(str(folder), torch.device("cpu"), torch.float32)
        return sample(model, seeds=seeds, prompts=None, num_steps=2, guidance_scale=None).latents.flatten(1)

    from edadm_cli.models.digits.data import model_folder

    full, noisy = latents(model_folder("tiny-digits-ddpm")), latents(pixel_run.path("export", "w4a8"))
    expected = ((noisy - full).norm(dim=1) / full.norm(dim=1)).mean()
    assert record.distance_to_full_precision.latent_rel_l2 == pytest.approx(float(expected), rel=1e-4)


def test_an_export_equal_to_full_precision_has_distance_zero(
    tmp_path: Path, pixel_run: RunFolder, export_noisy: Exporter
) -> None:
    export_noisy(pixel_run, 0.0)
    record = stage.run(_config(), pixel_run)
    assert record.distance_to_full_precision.latent_rel_l2 == 0.0
    assert record.distance_to_full_precision.ssim == 1.0
    assert record.distance_to_full_precision.perceptual_distance == 0.0
    assert record.distance_to_full_precision.one_step_rel_l2 == 0.0
    assert record.distance_to_full_precision.guided_one_step_rel_l2 is None
    ceiling = 10 * np.log10(255**2 * 8 * 8)
    assert record.distance_to_full_precision.psnr_db == pytest.approx(ceiling)
    assert record.metrics == record.full_precision
    assert pixel_run.open("evaluate", "w4a8").json("evaluation.json")["num_identical_images"] == 12


def test_more_noise_is_further_away(text_run: RunFolder, export_noisy: Exporter) -> None:
    little = stage.run(_config(), text_run).distance_to_full_precision
    export_noisy(text_run, 0.4)
    much = stage.run(_config(), text_run, force=True).distance_to_full_precision
    assert much.latent_rel_l2 > little.latent_rel_l2
    assert (much.psnr_db or 0) < (little.psnr_db or 0)


def test_full_precision_is_sampled_once_for_all_bit_widths_and_again_for_other_settings(
    text_run: RunFolder, export_noisy: Exporter, monkeypatch: pytest.MonkeyPatch
) -> None:
    sampled = _count_images(monkeypatch)
    stage.run(_config(), text_run)
    assert sampled == {"tiny-digits-sd": 12, "export": 12}
    export_noisy(text_run, 0.1)
    stage.run(_config(), text_run, force=True)
    assert sampled == {"tiny-digits-sd": 12, "export": 24}
    stage.run(_config(seed=1), text_run, force=True)
    assert sampled == {"tiny-digits-sd": 24, "export": 36}


def test_an_interrupted_evaluation_goes_on_and_ends_with_the_same_files(
    text_run: RunFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    undisturbed = _figures(stage.run(_config(), text_run))
    artifact = text_run.open("evaluate", "w4a8")
    hashes = {entry.path: entry.sha256 for entry in artifact.manifest.payload}
    for kind in ("w4a8", "full-precision"):
        shutil.rmtree(text_run.path("evaluate", kind))

    for allowed in (1, 2, 2):  # of three batches at each precision
        with monkeypatch.context() as patch:
            _fail_after(patch, allowed)
            with pytest.raises(KeyboardInterrupt):
                stage.run(_config(), text_run)
        assert not text_run.has("evaluate", "w4a8")
    sampled = _count_images(monkeypatch)
    assert _figures(stage.run(_config(), text_run)) == undisturbed
    assert sampled == {"export": 2}
    again = text_run.open("evaluate", "w4a8")
    assert {entry.path: entry.sha256 for entry in again.manifest.payload} == hashes


def test_a_damaged_store_of_full_precision_images_is_sampled_again(text_run: RunFolder) -> None:
    first = stage.run(_config(), text_run)
    path = text_run.path("evaluate", "full-precision") / "batch-00001.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(bytes(content))
    again = stage.run(_config(), text_run, force=True)
    assert _figures(again) == _figures(first)
    assert any("damaged" in warning for warning in again.warnings)


def test_broken_models_end_in_one_sentence(text_run: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    def spoil(change: Callable[[Samples], None]) -> None:
        def spoiled(model: LoadedModel, **arguments: Any) -> Samples:
            samples = sample(model, **arguments)
            if model.ref.id != "tiny-digits-sd":
                change(samples)
            return samples

        monkeypatch.setattr(images_module, "sample", spoiled)

    spoil(lambda samples: samples.latents[1].fill_(float("nan")))
    with pytest.raises(InputError, match=f"seed {image_seed(0, 1, EVALUATION)} .* not finite"):
        stage.run(_config(), text_run)
    spoil(lambda samples: samples.images.fill_(0))
    with pytest.raises(InputError, match="each of 5 images is of one flat colour"):
        stage.run(_config(), text_run)
    assert not text_run.has("evaluate", "w4a8")


def test_only_named_metrics_are_computed_and_unknown_ones_refused(text_run: RunFolder) -> None:
    record = stage.run(_config(metrics=("prompt_accuracy",)), text_run)
    assert set(record.metrics) == {"prompt_accuracy"}
    with pytest.raises(UsageError, match="no metric 'fid'"):
        stage.run(_config(metrics=("fid",)), text_run)


def test_metrics_about_prompts_are_left_out_where_no_prompt_names_a_digit(text_run: RunFolder, tmp_path: Path) -> None:
    file = tmp_path / "prompts.txt"
    file.write_text("<script>alert(x)</script>\na cat\n", encoding="utf-8")
    record = stage.run(_config(prompts=file), text_run)
    assert "prompt_accuracy" not in record.metrics
    result = text_run.open("evaluate", "w4a8").json("evaluation.json")
    assert list(result["skipped"]) == ["prompt_accuracy"]
    assert result["shown"][0]["prompt"] == "<script>alert(x)</script>"
    with pytest.raises(InputError, match="prompt_accuracy cannot be computed"):
        stage.run(_config(prompts=file, metrics=("prompt_accuracy",)), text_run)


def test_prompts_and_guidance_are_refused_for_a_model_without(pixel_run: RunFolder, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no guidance"):
        stage.run(_config(guidance_scale=2.0), pixel_run)
    with pytest.raises(UsageError, match="no prompts"):
        stage.run(_config(prompts=tmp_path / "prompts.txt"), pixel_run)
    with pytest.raises(InputError, match="takes no prompts"):
        stage.run(_config(metrics=("prompt_accuracy",)), pixel_run)


def test_a_changed_parent_is_noticed(text_run: RunFolder, export_noisy: Exporter) -> None:
    stage.run(_config(), text_run)
    export_noisy(text_run, 0.2)
    with pytest.raises(InputError, match="other settings"):
        stage.run(_config(), text_run)
    with pytest.raises(InputError, match="made from another"):
        text_run.open("evaluate", "w4a8")


def test_estimate_writes_nothing(text_run: RunFolder) -> None:
    before = sorted(text_run.root.rglob("*"))
    estimate = evaluate_estimates.estimate(_config(), text_run)
    assert estimate.seconds > 0
    assert estimate.disk_mib > 0
    assert sorted(text_run.root.rglob("*")) == before


def test_batches_that_were_cut_short_or_are_foreign_are_sampled_again(
    text_run: RunFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    undisturbed = _figures(stage.run(_config(), text_run))
    shutil.rmtree(text_run.path("evaluate", "w4a8"))
    with monkeypatch.context() as patch:
        _fail_after(patch, 2)
        with pytest.raises(KeyboardInterrupt):
            stage.run(_config(), text_run)
    (partial,) = text_run.path("evaluate").glob(".w4a8.partial-*")
    save_tensors(partial / "batch-00000.safetensors", {"images": torch.zeros(5, 1, 16, 16)})
    cut = partial / "batch-00001.safetensors"
    cut.write_bytes(cut.read_bytes()[:-7])
    assert _figures(stage.run(_config(), text_run)) == undisturbed


def _count_images(monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """Count the images that are sampled, by pipeline."""
    counts: dict[str, int] = {}

    def counted(model: LoadedModel, **arguments: Any) -> Samples:
        name = "export" if "export" in model.ref.id else model.ref.id
        counts[name] = counts.get(name, 0) + len(arguments["seeds"])
        return sample(model, **arguments)

    monkeypatch.setattr(images_module, "sample", counted)
    return counts


def _fail_after(patch: pytest.MonkeyPatch, allowed: int) -> None:
    """Interrupt the batch after the allowed ones."""
    left = [allowed]

    def failing(model: LoadedModel, **arguments: Any) -> Samples:
        if left[0] == 0:
            raise KeyboardInterrupt
        left[0] -= 1
        return sample(model, **arguments)

    patch.setattr(images_module, "sample", failing)


def test_the_one_step_error_is_that_of_both_denoisers_on_the_same_inputs(text_run: RunFolder) -> None:
    record = stage.run(_config(), text_run)
    error = text_run.open("evaluate", "w4a8").json("evaluation.json")["one_step"]
    distance = record.distance_to_full_precision
    assert error["num_images"] == 5, "a batch of the evaluation's own images, whose noise no calibration has seen"
    assert (distance.one_step_rel_l2, distance.guided_one_step_rel_l2) == (error["rel_l2"], error["guided_rel_l2"])
    assert 0 < error["rel_l2"] < error["guided_rel_l2"], "guidance amplifies the difference of the branches"
    assert min(error["by_step"]) <= error["rel_l2"] <= max(error["by_step"])
    assert len(error["by_step"]) == len(error["guided_by_step"]) == len(error["growth"])
    assert error["growth"][0] == 0.0, "both begin with the same noise"
    assert error["growth"][-1] > 0
    assert any(f"{error['guided_rel_l2']:.3g}" in sentence for sentence in record.verdict)


def test_images_that_became_black_are_counted_in_the_verdict(
    text_run: RunFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    def darkened(model: LoadedModel, **fields: Any) -> Samples:
        samples = sample(model, **fields)
        if model.ref.id != text_run.open("collect").manifest.model.id:
            samples.images[0] = 0
        return samples

    monkeypatch.setattr(images_module, "sample", darkened)
    record = stage.run(_config(), text_run)
    assert "3 of 12 images are black" in record.verdict[0]


TOY = """
from edadm_cli.metrics.base import Metric, Value
class MeanLevel(Metric):
    name, label, better = "mean_level", "Mean level", "higher"
    def compute(self, context, resource):
        means = [float(images.float().mean()) for images, _ in context.images.pairs()]
        return Value(sum(means) / len(means), "pixels", len(context.images))
class LargestDifference(Metric):
    name, label, better, paired, compared = "largest_difference", "Largest difference", "lower", True, "pixels"
    def compute(self, context, resource):
        both = zip(context.images.pairs(), context.reference.pairs())
        pairs = [pair for (images, _), (others, _) in both for pair in zip(images, others)]
        values = [int((a.int() - b.int()).abs().max()) for a, b in pairs]
        return Value(max(values), self.compared, len(values), tuple(float(value) for value in values))
"""


def test_metrics_of_another_package_are_computed_by_the_command_and_shown_by_the_report(
    text_run: RunFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "toy_metrics.py").write_text(TOY)
    monkeypatch.syspath_prepend(str(tmp_path))
    points = [
        importlib.metadata.EntryPoint(name, f"toy_metrics:{name}", "edadm.metrics")
        for name in ("MeanLevel", "LargestDifference")
    ]
    known = plugins.entry_points
    monkeypatch.setattr(
        plugins, "entry_points", lambda group: points if group == "edadm.metrics" else known(group=group)
    )
    registry.metrics.cache_clear()
    run, device = ["--run", str(text_run.root)], ["--device", "cpu"]
    try:
        assert main(["evaluate", "--bits", "w4a8", "--num-images", "4", "--json", *run, *device]) == 0
        record = json.loads(capsys.readouterr().out)
        assert main(["report", "--quiet", *run]) == 0
    finally:
        registry.metrics.cache_clear()
    assert 0 < record["metrics"]["mean_level"]["value"] < 255
    assert record["distance_to_full_precision"]["largest_difference"] > 0
    distances = text_run.open("evaluate", "w4a8").json("distances.json")
    assert max(distances["largest_difference"]) == record["distance_to_full_precision"]["largest_difference"]
    page = Path(capsys.readouterr().out.strip()).read_text()
    assert "Mean level" in page
    assert "Largest difference to full precision" in page
