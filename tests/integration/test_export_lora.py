"""A LoRA that is fused before packing: the weights that come out, what stays, and files that are refused."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline
from safetensors.torch import save_file

from edadm_cli import export, reconstruct
from edadm_cli.artifacts import RunFolder
from edadm_cli.calibrate.nearest import nearest_codes
from edadm_cli.config import BitWidth, ExportConfig, ReconstructConfig
from edadm_cli.errors import InputError, UsageError
from edadm_cli.export.fusing import LoraFile, moved_codes
from edadm_cli.quant.groups import codes_of, per_weight, search_groups
from edadm_cli.quant.plan import LayerPlan
from edadm_cli.quant.search import weight_scales
from edadm_cli.recipe import RangeRecipe, load_recipe

pytest.importorskip("peft")

W8A8 = BitWidth.parse("w8a8")
LAYER = "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"


@pytest.fixture(scope="module")
def reconstructed(
    selected: Callable[[Path], Path], few_blocks_sd: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """A run up to its reconstruction; not to be changed."""
    root = tmp_path_factory.mktemp("lora") / "run"
    shutil.copytree(selected(few_blocks_sd), root)
    reconstruct.STAGE.run(ReconstructConfig(bits=W8A8, recipe=load_recipe("rtn"), device="cpu"), RunFolder(root))
    return root


@pytest.fixture
def run(reconstructed: Path, tmp_path: Path) -> RunFolder:
    shutil.copytree(reconstructed, tmp_path / "run")
    return RunFolder(tmp_path / "run")


def _export(run: RunFolder, *lora: str, force: bool = False) -> Any:
    return export.STAGE.run(ExportConfig(bits=W8A8, device="cpu", parity_samples=1, lora=lora), run, force=force)


def _lora(path: Path, rows: int, key: str, scale: float = 0.2) -> Path:
    generator = torch.Generator().manual_seed(1)
    a, b = (scale * torch.randn(shape, generator=generator) for shape in ((2, rows), (rows, 2)))
    tensors = {f"{key}.lora_A.weight": a, f"{key}.lora_B.weight": b}
    if key.startswith("lora_"):
        tensors = {f"{key}.lora_down.weight": a, f"{key}.lora_up.weight": b, f"{key}.alpha": torch.tensor(2.0)}
    save_file(tensors, path)
    return path


def test_codes_keep_their_learned_direction_where_it_is_still_a_neighbour() -> None:
    layer, scale = LayerPlan(weight_bits=4, activation_bits=8), torch.tensor([1.0])
    old = torch.tensor([[1.4, 1.4, 1.4, -2.2, 0.0, 6.0]])
    codes = torch.tensor([[1, 2, 2, -2, 0, 6]], dtype=torch.int8)  # the second and third were learned upwards
    new = torch.tensor([[1.4, 1.45, 2.9, -0.8, 0.6, 7.2]])
    moved, same = moved_codes(codes, old, new, scale, layer)
    assert moved.tolist() == [[1, 2, 3, -1, 1, 7]]
    assert same == scale
    _, wider = moved_codes(codes, old, 3 * old, scale, layer)
    assert wider == 3 * scale


def test_a_channel_of_zeros_gets_a_scale_that_covers_its_fused_weights() -> None:
    layer = LayerPlan(weight_bits=4, activation_bits=8)
    old = torch.tensor([[1.0, -0.5, 0.2], [0.0, 0.0, 0.0]])
    new = old + torch.tensor([[0.0, 0.1, 0.0], [0.03, -0.07, 0.01]])
    scale = weight_scales(old, layer.weight_grid, RangeRecipe())
    codes, fused_scale = moved_codes(nearest_codes(old, scale, layer), old, new, scale, layer)
    assert ((codes * fused_scale[:, None] - new)[1].abs() <= 0.51 * fused_scale[1]).all()
    assert fused_scale[1] == pytest.approx(0.01)


def test_codes_in_groups_move_by_steps_of_their_groups() -> None:
    old = torch.randn(6, 40, generator=torch.Generator().manual_seed(0))
    layer = LayerPlan(weight_bits=4, activation_bits=8, group_size=16)
    scale, multipliers = search_groups(old, layer.weight_grid, 16, RangeRecipe())
    integers = nearest_codes(old, scale, layer, multipliers)
    unmoved, same = moved_codes(integers, old, old, scale, layer, multipliers)
    assert torch.equal(unmoved, integers)
    assert torch.equal(same, scale)
    steps = scale[:, None] * per_weight(multipliers, (6, 40), 16)
    moved, _ = moved_codes(integers, old, old + steps, scale, layer, multipliers)
    before, after = (codes_of(each, multipliers, 16) for each in (integers, moved))
    inside = (before > -8) & (before < 7)  # the ends of the grid hold weights that lie beyond it
    assert inside.sum() > 200
    assert torch.equal(after[inside], before[inside] + 1)


@pytest.mark.parametrize("key", [f"unet.{LAYER}", f"lora_unet_{LAYER.replace('.', '_')}"])
def test_an_export_holds_the_fused_weights_and_says_so(
    key: str, run: RunFolder, few_blocks_sd: Path, tmp_path: Path
) -> None:
    pipeline: Any = DiffusionPipeline.from_pretrained(few_blocks_sd)
    rows = pipeline.unet.get_submodule(LAYER).weight.shape[0]
    file = _lora(tmp_path / "style.safetensors", rows, key)
    pipeline.load_lora_weights(str(file))
    pipeline.fuse_lora(lora_scale=0.5)
    expected = pipeline.unet.get_submodule(LAYER).base_layer.weight
    plain = _export(run)
    record = _export(run, f"{file}:0.5", force=True)
    assert record.identity != plain.identity
    assert _export(run, f"{file}:0.5").status == "up_to_date"
    loaded: Any = DiffusionPipeline.from_pretrained(record.artifact)
    layer = loaded.unet.get_submodule(LAYER)
    assert (
        layer.weight - expected
    ).abs().max() <= layer.weight_scale.max() * 1.6  # a step and a half at the ends of the grid
    fused = run.open("export", "w8a8")
    assert "safetensors at weight 0.5" in (fused.path / "README.md").read_text()
    assert any("of the codes of its layers" in text for text in record.warnings)


def test_a_lora_of_the_text_encoder_is_in_the_export_too(run: RunFolder, tmp_path: Path) -> None:
    before: Any = DiffusionPipeline.from_pretrained(_export(run).artifact).text_encoder
    name, weight = next(
        (name, module.weight) for name, module in before.named_modules() if name.endswith("layers.0.self_attn.q_proj")
    )
    file = _lora(tmp_path / "words.safetensors", weight.shape[0], f"text_encoder.{name.removeprefix('text_model.')}")
    after: Any = DiffusionPipeline.from_pretrained(_export(run, str(file), force=True).artifact).text_encoder
    assert not torch.equal(after.get_submodule(name).weight, weight)


@pytest.mark.parametrize(
    ("rows", "key", "sentence"),
    [(7, f"unet.{LAYER}", "is not a LoRA of"), (8, "unet.nowhere.to_q", "LoRA of")],
)
def test_files_that_do_not_fit_are_refused(rows: int, key: str, sentence: str, run: RunFolder, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=sentence):
        _export(run, str(_lora(tmp_path / "other.safetensors", rows, key)))


def test_the_weight_is_behind_the_last_colon(tmp_path: Path) -> None:
    file, odd, pickled = (tmp_path / name for name in ("style.v1.safetensors", "a:b.safetensors", "style.bin"))
    for path in (file, odd, pickled):
        path.touch()
    assert LoraFile.parse(f"{file}:-0.5") == LoraFile(file, -0.5)
    assert LoraFile.parse(str(odd)) == LoraFile(odd)
    assert LoraFile.parse(f"{odd}:2") == LoraFile(odd, 2.0)
    for text in (f"{file}:abc", f"{file}:", f"{file}:nan", f"{file}:101"):
        with pytest.raises(UsageError, match="a number from -100 to 100"):
            LoraFile.parse(text)
    for text, sentence in ((":abc", "no LoRA file :abc"), (str(pickled), "can run code"), (f"{tmp_path}:1", "no LoRA")):
        with pytest.raises(InputError, match=sentence):
            LoraFile.parse(text)
