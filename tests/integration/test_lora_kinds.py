"""LoRA files in PEFT's and kohya's names on pipelines of SDXL, FLUX and Stable Diffusion 3, text encoders included.

A file of kohya names the modules of the published checkpoint, where query, key and value are one matrix. Its
`lora_down` belongs to all three layers of diffusers then, and its `lora_up` has the rows of all three.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from edadm_cli.calibrate.nearest import quantize_to_nearest
from edadm_cli.config import BitWidth
from edadm_cli.errors import InputError
from edadm_cli.export.fusing import LoraFile, fuse
from edadm_cli.integrations.comfyui.names import original_names
from edadm_cli.integrations.kohya import in_diffusers_names
from edadm_cli.integrations.lora import load_lora_file, weight_shape
from edadm_cli.integrations.methods import bind_methods
from edadm_cli.models.example_calls import example_call
from edadm_cli.models.loaded import LoadedModel
from edadm_cli.models.loading import load_model
from edadm_cli.quant.layers import QuantizedLayer
from edadm_cli.quant.split_layer import SplitLayer
from edadm_cli.recipe import load_recipe
from tests.denoisers import flux, transformers

pytest.importorskip("peft")

RANK, ALPHA = 2, 1.0
MODULES = {
    "sdxl": ("middle_block.1.transformer_blocks.0.attn1.to_q", "input_blocks.3.1.transformer_blocks.0.ff.net.2"),
    "flux": ("double_blocks.0.img_attn.qkv", "double_blocks.0.txt_mlp.2", "single_blocks.1.linear2"),
    "sd3": (
        "joint_blocks.0.x_block.attn.qkv",
        "joint_blocks.1.context_block.attn.qkv",
        "joint_blocks.0.x_block.mlp.fc1",
        "final_layer.adaLN_modulation.1",  # shift and scale are the other way round
    ),
}
ENCODERS = {
    "sdxl": ("text_encoder", "text_encoder_2"),
    "flux": ("text_encoder",),
    "sd3": ("text_encoder", "text_encoder_2"),
}
PROJECTIONS = (
    "layers.0.self_attn.q_proj",
    "layers.0.self_attn.out_proj",
)  # diffusers recognizes kohya's files by the latter


@dataclass
class Adapter:
    """One adapter: its tensors in both styles of names, and what it adds to which layer of which component."""

    peft: dict[str, Tensor] = field(default_factory=dict)
    kohya: dict[str, Tensor] = field(default_factory=dict)
    factors: dict[str, dict[str, tuple[Tensor, Tensor]]] = field(default_factory=dict)

    def add(
        self, component: str, names: list[str], rows: list[int], columns: int, stem: str, swaps: bool = False
    ) -> None:
        """Draws the factors of a module that consists of some layers."""
        down, up = 0.3 * torch.randn(RANK, columns), 0.3 * torch.randn(sum(rows), RANK)
        for name, part in zip(names, up.split(rows), strict=True):
            self.factors.setdefault(component, {})[name] = (down, part)
            self.peft[f"{component}.{name}.lora_A.weight"] = down.clone()
            self.peft[f"{component}.{name}.lora_B.weight"] = part.clone()
        self.kohya[f"{stem}.lora_down.weight"] = down.clone()
        stored = torch.cat(up.chunk(2)[::-1]) if swaps else up
        self.kohya[f"{stem}.lora_up.weight"] = stored * (RANK / ALPHA)
        self.kohya[f"{stem}.alpha"] = torch.tensor(ALPHA)


def _shape(layer: nn.Module) -> tuple[int, ...]:
    return weight_shape(layer) if isinstance(layer, QuantizedLayer | SplitLayer) else tuple(layer.weight.shape)  # type: ignore[arg-type]


def _adapter(kind: str, model: LoadedModel, seed: int) -> Adapter:
    torch.manual_seed(seed)
    adapter, pipeline = Adapter(), model.pipeline
    names = [name for name, _ in model.denoiser.named_parameters() if name.endswith(".weight")]
    sources = original_names(model.denoiser, names)
    for module in MODULES[kind]:
        source = sources[f"{module}.weight"]
        layers = [name.removesuffix(".weight") for name in source.names]
        shapes = [_shape(model.denoiser.get_submodule(name)) for name in layers]
        stem = f"lora_unet_{module.replace('.', '_')}"
        adapter.add(model.denoiser_name, layers, [s[0] for s in shapes], shapes[0][1], stem, source.swaps_halves)
    for number, component in enumerate(ENCODERS[kind]):
        modules = dict(getattr(pipeline, component).named_modules())
        for end in PROJECTIONS:
            name = next(name for name in modules if name.endswith(end))
            rows, columns = _shape(modules[name])
            stem = f"lora_te{number + 1}_text_model_encoder_{end.replace('.', '_')}"
            adapter.add(component, [name], [rows], columns, stem)
    return adapter


@contextmanager
def _branches(pipeline: Any, *adapters: tuple[Adapter, float]) -> Iterator[None]:
    """Adds by hooks what the adapters are to add."""

    def added(a: Tensor, b: Tensor, weight: float) -> Any:
        return lambda _, args, output: output + weight * nn.functional.linear(nn.functional.linear(args[0], a), b)

    with ExitStack() as stack:
        for adapter, weight in adapters:
            for component, factors in adapter.factors.items():
                for name, (a, b) in factors.items():
                    layer = getattr(pipeline, component).get_submodule(name)
                    stack.callback(layer.register_forward_hook(added(a, b, weight)).remove)
        yield


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory, tiny_sdxl: Path) -> dict[str, Path]:
    """Saved pipelines of random weights."""
    torch.manual_seed(0)
    root = tmp_path_factory.mktemp("kinds")
    flux.flux_dev().save_pretrained(root / "flux")
    transformers.sd3().save_pretrained(root / "sd3")
    return {"sdxl": tiny_sdxl, "flux": root / "flux", "sd3": root / "sd3"}


def _model(folder: Path) -> LoadedModel:
    return load_model(str(folder), torch.device("cpu"), torch.float32)


@torch.no_grad()
def _outputs(kind: str, pipeline: Any, denoiser: nn.Module, call: Any) -> list[Tensor]:
    """The denoiser's prediction and the states of the text encoders."""
    ids = torch.tensor([[1, 5, 2]])
    states = [getattr(pipeline, name)(ids, output_hidden_states=True).hidden_states[-1] for name in ENCODERS[kind]]
    return [denoiser(*call[0], **call[1])[0], *states]


def _assert_close(outputs: list[Tensor], expected: list[Tensor]) -> None:
    for output, each in zip(outputs, expected, strict=True):
        torch.testing.assert_close(output, each, rtol=1e-3, atol=1e-4)


def _saved(tensors: Mapping[str, Tensor], path: Path) -> Path:
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path)
    return path


@pytest.mark.parametrize("kind", MODULES)
def test_two_adapters_in_both_styles_are_weighted_and_unloaded(
    kind: str, folders: dict[str, Path], tmp_path: Path
) -> None:
    model = _model(folders[kind])
    first, second = (_adapter(kind, model, seed) for seed in (1, 2))
    pipeline, denoiser = model.pipeline, model.denoiser
    call = example_call(denoiser, batch_size=1)
    quantize_to_nearest(denoiser, load_recipe("rtn"), BitWidth.parse("w8a8"), [call])
    bind_methods(denoiser)
    before = _outputs(kind, pipeline, denoiser, call)
    with _branches(pipeline, (first, 0.5), (second, -1.5)):
        expected = _outputs(kind, pipeline, denoiser, call)
    for output, plain in zip(expected, before, strict=True):
        assert (output - plain).norm() > 0.01 * plain.norm()
    load_lora_file(pipeline, _saved(first.peft, tmp_path / "first.safetensors"), "first")
    load_lora_file(pipeline, _saved(second.kohya, tmp_path / "second.safetensors"), "second")
    pipeline.set_adapters(["first", "second"], adapter_weights=[0.5, -1.5])
    _assert_close(_outputs(kind, pipeline, denoiser, call), expected)
    pipeline.unload_lora_weights()
    for output, plain in zip(_outputs(kind, pipeline, denoiser, call), before, strict=True):
        assert torch.equal(output, plain)


@pytest.mark.parametrize("style", ["peft", "kohya"])
@pytest.mark.parametrize("kind", MODULES)
def test_a_fused_adapter_is_in_the_weights(kind: str, style: str, folders: dict[str, Path], tmp_path: Path) -> None:
    model = _model(folders[kind])
    adapter = _adapter(kind, model, 1)
    before = {
        (component, name): getattr(model.pipeline, component).get_submodule(name).weight.clone()
        for component, factors in adapter.factors.items()
        for name in factors
    }
    fused = fuse(model, [LoraFile(_saved(getattr(adapter, style), tmp_path / "style.safetensors"), 0.5)])
    assert fused.components == set(ENCODERS[kind])
    assert set(fused.before) == set(adapter.factors[model.denoiser_name])
    for (component, name), weight in before.items():
        a, b = adapter.factors[component][name]
        now = getattr(model.pipeline, component).get_submodule(name).weight
        torch.testing.assert_close(now, weight + 0.5 * b @ a, rtol=1e-4, atol=1e-5)


def test_a_state_shows_shapes_of_weights_and_is_saved_without_its_model(
    folders: dict[str, Path], tmp_path: Path
) -> None:
    model = _model(folders["flux"])
    denoiser = model.denoiser
    shape = denoiser.get_submodule("proj_out").weight.shape
    quantize_to_nearest(denoiser, load_recipe("rtn"), BitWidth.parse("w8a8"), [example_call(denoiser, batch_size=1)])
    plain = denoiser.state_dict()
    bind_methods(denoiser)
    state = denoiser.state_dict()
    assert list(state) == list(plain)
    assert state["proj_out.weight"].shape == shape
    assert "proj_out.weight" not in state
    for name in ("proj_out.nothing", "pos_embed.weight"):
        with pytest.raises(KeyError):
            state[name]
    torch.save(state, tmp_path / "state.pt")
    assert list(torch.load(tmp_path / "state.pt", weights_only=True)) == list(plain)
    denoiser.load_state_dict(copy.copy(state))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"lora_unet_joint_blocks_9_x_block_attn_qkv.lora_down.weight": torch.zeros(2, 32)}, "is no layer of"),
        ({"lora_te3_encoder_block_0_layer_0_SelfAttention_q.lora_down.weight": torch.zeros(2, 32)}, "a layer of T5"),
        (
            {"lora_unet_joint_blocks_0_x_block_attn_qkv.lora_up.weight": torch.zeros(95, 2)},
            "95 rows; its layers have 96",
        ),
        ({"lora_unet_joint_blocks_0_x_block_attn_qkv.lora_up.weight": None}, "is missing"),
    ],
)
def test_names_of_kohya_that_fit_no_layer_are_refused(
    changes: dict[str, Tensor | None], words: str, folders: dict[str, Path]
) -> None:
    model = _model(folders["sd3"])
    tensors = {**_adapter("sd3", model, 1).kohya, **changes}
    with pytest.raises(InputError, match=words):
        in_diffusers_names(model.pipeline, {name: each for name, each in tensors.items() if each is not None})
