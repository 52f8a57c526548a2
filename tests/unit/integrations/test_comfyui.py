"""ComfyUI's file of a denoiser holds the export's own weights under the names of the published checkpoints."""

from __future__ import annotations

import shutil
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers.loaders import single_file_utils
from torch import Tensor, nn

from edadm_cli.cli.app import main
from edadm_cli.errors import InputError
from edadm_cli.integrations.comfyui.reading import dequantized_state, is_quantized_state
from edadm_cli.integrations.comfyui.writing import comfyui_state
from edadm_cli.models.loading import load_model
from edadm_cli.quant import transforms as transforms_module
from edadm_cli.quant.layers import quantized_layer, quantized_layers
from edadm_cli.quant.network import set_module
from edadm_cli.quant.plan import LayerPlan
from edadm_cli.quant.transforms import Transform, regular_hadamard, transform_named
from tests.unit.integrations.comfyui_kinds import KINDS, narrow_flux_conversion, quantize_all


def _restored(kind: str, state: dict[str, Tensor], denoiser: nn.Module) -> dict[str, Tensor]:
    """The names of diffusers again, by diffusers' own reading of the published checkpoints."""
    if kind == "unet":
        return single_file_utils.convert_ldm_unet_checkpoint(state, dict(denoiser.config))
    convert = {
        "flux": narrow_flux_conversion(),
        "sd3": single_file_utils.convert_sd3_transformer_checkpoint_to_diffusers,
        "z_image": single_file_utils.convert_z_image_transformer_checkpoint_to_diffusers,
    }.get(kind)
    if convert is None:
        return {name.removeprefix("model.diffusion_model."): tensor for name, tensor in state.items()}
    if kind == "sd3":
        state = {name.removeprefix("model.diffusion_model."): tensor for name, tensor in state.items()}
    return convert(state)


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_written_is_read_back_as_the_same_denoiser(kind: str) -> None:
    torch.manual_seed(0)
    denoiser = KINDS[kind]()
    expected = {name: tensor.clone() for name, tensor in denoiser.state_dict().items()}
    expected.update(quantize_all(denoiser))
    state = comfyui_state(denoiser)
    assert is_quantized_state(state)
    marked = [name for name in state if name.endswith(".comfy_quant")]
    assert all(state[name.replace("comfy_quant", "weight")].dtype == torch.int8 for name in marked)
    assert all(state[name.replace("comfy_quant", "weight_scale")].shape[1:] == (1,) for name in marked)
    restored = _restored(kind, dequantized_state(state, "file"), denoiser)
    assert restored.keys() == expected.keys()
    for name, tensor in restored.items():
        is_codes = tensor.dtype == torch.float32 and expected[name].ndim == 2
        bound = 0 if is_codes else 1e-3  # float16 has 11 bits
        assert torch.allclose(tensor.float(), expected[name].float(), rtol=bound, atol=bound), name


GOLDEN = {
    "flux": "130be1f153dccac0",
    "sd3": "c7cd42a234990ddd",
    "unet": "0b0e8644312967c9",
    "qwen": "dbba7812ada3026b",
    "z_image": "7be57a9da79f7820",
}


@pytest.mark.parametrize("kind", KINDS)
def test_names_types_and_shapes_of_a_file_do_not_change(kind: str) -> None:
    """A digest per kind of the lines `name type shape`: files that users have made stay what ComfyUI reads."""
    torch.manual_seed(0)
    denoiser = KINDS[kind]()
    quantize_all(denoiser)
    state = comfyui_state(denoiser)
    lines = sorted(f"{name} {tensor.dtype} {list(tensor.shape)}" for name, tensor in state.items())
    assert sha256("\n".join(lines).encode()).hexdigest()[:16] == GOLDEN[kind]


def _transformed(rows: int, columns: int, transform: str, *, is_image: bool = False) -> Any:
    """A layer whose weight holds the inverse of a transform, in eight bits, and its weight without the transform."""
    torch.manual_seed(0)
    layer: Any = nn.Conv2d(columns, rows, 3) if is_image else nn.Linear(columns, rows)
    named = transform_named(transform)
    tensors = {name: torch.rand(columns) + 0.5 for name in named.tensors}
    folded = named.fold(layer.weight.detach(), tensors)
    scale = folded.flatten(1).abs().amax(1) / 127
    codes = (folded / scale.reshape(-1, *[1] * (folded.ndim - 1))).round().to(torch.int8)
    quantized: Any = quantized_layer(layer, LayerPlan(weight_bits=8, activation_bits=8, transform=transform))
    quantized.set_parameters(codes, scale, torch.ones(()), torch.zeros(()), **tensors)
    return quantized, layer.weight.detach()


@pytest.mark.parametrize("transform", ["hadamard-16", "hadamard-256", "input-channel-scale"])
@pytest.mark.parametrize("kind", ["projection", "mixed", "image"])
def test_a_transform_is_written_such_that_comfyui_computes_the_same(transform: str, kind: str) -> None:
    """`projection` is one matrix of one layer, `mixed` one of three of which one has no transform."""
    denoiser: Any = KINDS["unet" if kind == "image" else "flux"]()
    if kind == "image":
        name, shape = "conv_in", denoiser.conv_in.weight.shape
    else:
        name = "transformer_blocks.0.ff.net.2" if kind == "projection" else "transformer_blocks.0.attn.to_q"
        shape = denoiser.get_submodule(name).weight.shape
    expected = denoiser.state_dict()
    layer, weight = _transformed(shape[0], shape[1], transform, is_image=kind == "image")
    set_module(denoiser, name, layer)
    expected |= {f"{name}.weight": weight, f"{name}.bias": layer.bias}
    state = comfyui_state(denoiser)
    assert any(name.endswith(".comfy_quant") for name in state) == (kind == "projection" and "hadamard" in transform)
    restored = _restored("unet" if kind == "image" else "flux", dequantized_state(state, "file"), denoiser)
    assert (restored[f"{name}.weight"].float() - weight).abs().max() < 0.02 * weight.abs().max()


def test_a_transform_that_comfyui_cannot_run_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    class Reverse(Transform):
        name, tensors = "reverse", ()

        def calibrate(self, weight: Tensor, statistics: Any, options: Any) -> dict[str, Tensor]:
            return {}

        def apply(self, x: Tensor, tensors: Any, channel_dim: int) -> Tensor:
            return x.flip(channel_dim)

        def fold(self, weight: Tensor, tensors: Any) -> Tensor:
            return weight.flip(1)

    monkeypatch.setitem(transforms_module._registered, "reverse", Reverse())
    denoiser: Any = KINDS["flux"]()
    name = "transformer_blocks.0.ff.net.2"
    set_module(denoiser, name, _transformed(*denoiser.get_submodule(name).weight.shape, "reverse")[0])
    with pytest.raises(InputError, match="'reverse'"):
        comfyui_state(denoiser)


def test_rotated_weights_are_rotated_back() -> None:
    hadamard = regular_hadamard(16)
    torch.testing.assert_close(hadamard @ hadamard.T, torch.eye(16))
    assert torch.equal(hadamard, hadamard.T)
    assert hadamard.abs().unique().tolist() == [0.25]
    weight = torch.randn(6, 32, generator=torch.Generator().manual_seed(0))
    rotated = (weight.reshape(6, 2, 16) @ hadamard.T).reshape(6, 32)
    scale = rotated.abs().amax(1, keepdim=True) / 127
    about = b'{"format":"int8_tensorwise","convrot":true,"convrot_groupsize":16}'
    state = {
        "a.weight": (rotated / scale).round().to(torch.int8),
        "a.weight_scale": scale,
        "a.input_scale": torch.ones(()),
        "a.comfy_quant": torch.tensor(list(about), dtype=torch.uint8),
    }
    restored = dequantized_state(state, "file")
    assert restored.keys() == {"a.weight"}
    assert (restored["a.weight"] - weight).abs().max() < 4 * scale.max()


def _of_comfy_kitchen(state: dict[str, Tensor], name: str, **rotation: Any) -> Any:
    """A layer's weight of a file as the tensor that ComfyUI makes of it."""
    kitchen = pytest.importorskip("comfy_kitchen.tensor", reason="pip install comfy-kitchen")
    codes = state[f"{name}.weight"]
    params = kitchen.TensorWiseINT8Layout.Params(
        scale=state[f"{name}.weight_scale"], orig_dtype=torch.float32, orig_shape=tuple(codes.shape), **rotation
    )
    return kitchen.QuantizedTensor(codes, "TensorWiseINT8Layout", params)


def test_comfy_kitchen_reads_the_same_weights_and_multiplies_to_the_same_numbers() -> None:
    torch.manual_seed(0)
    denoiser = KINDS["flux"]()
    quantize_all(denoiser)
    state = comfyui_state(denoiser)
    expected = dequantized_state(state, "file")
    names = [name.removesuffix(".comfy_quant") for name in state if name.endswith(".comfy_quant")]
    for name in names:
        weight = _of_comfy_kitchen(state, name)
        torch.testing.assert_close(weight.dequantize(), expected[f"{name}.weight"], rtol=1e-6, atol=0)
        x = torch.randn(5, weight.shape[1])
        step = x.abs().amax(1, keepdim=True) / 127  # one scale per token
        sums = (x / step).round().double() @ state[f"{name}.weight"].double().T
        exact = (sums * step.double() * state[f"{name}.weight_scale"].double().T).float()
        torch.testing.assert_close(nn.functional.linear(x, weight), exact, rtol=1e-5, atol=1e-5 * exact.abs().max())


def test_comfy_kitchen_rotates_back_what_is_read_here() -> None:
    hadamard, weight = regular_hadamard(16), torch.randn(6, 32, generator=torch.Generator().manual_seed(0))
    rotated = (weight.reshape(6, 2, 16) @ hadamard.T).reshape(6, 32)
    scale = rotated.abs().amax(1, keepdim=True) / 127
    about = b'{"format":"int8_tensorwise","convrot":true,"convrot_groupsize":16}'
    codes, mark = (rotated / scale).round().to(torch.int8), torch.tensor(list(about), dtype=torch.uint8)
    state = {"a.weight": codes, "a.weight_scale": scale, "a.comfy_quant": mark}
    theirs = _of_comfy_kitchen(state, "a", convrot=True, convrot_groupsize=16).dequantize()
    torch.testing.assert_close(theirs, dequantized_state(state, "file")["a.weight"], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("a.comfy_quant", b'{"format":"mxfp8"}', "only 'int8_tensorwise'"),
        ("a.comfy_quant", b"{", "JSON object"),
        ("a.comfy_quant", b'{"format":"int8_tensorwise","convrot":true,"convrot_groupsize":12}', "power of 4"),
        ("a.weight_scale", torch.ones(3, 1), "one per row"),
        ("a.comfy_quant", b'{"format":"int8_tensorwise","convrot":true,"convrot_groupsize":65536}', "4096"),
        ("a.weight_scale", torch.tensor([[float("nan")]] * 4), "finite"),
        ("a.weight_scale", torch.full((4, 1), float("nan")).to(torch.float8_e4m3fn), "finite"),
        ("a.weight_scale", None, "a 'weight_scale'"),
        ("a.comfy_quant", None, "'a.comfy_quant', which says how to read them"),
        ("a.weight", torch.zeros(4, 12), "int8"),
        ("a.weight", torch.zeros(()).to(torch.float8_e4m3fn), "one per row of 1"),
    ],
)
def test_what_does_not_fit_is_refused(name: str, value: Any, words: str) -> None:
    state = {
        "a.weight": torch.zeros(4, 12, dtype=torch.int8),
        "a.weight_scale": torch.ones(4, 1),
        "a.comfy_quant": torch.tensor(list(b'{"format":"int8_tensorwise"}'), dtype=torch.uint8),
    }
    state[name] = torch.tensor(list(value), dtype=torch.uint8) if isinstance(value, bytes) else value
    state = {key: tensor for key, tensor in state.items() if tensor is not None}
    assert is_quantized_state(state)
    with pytest.raises(InputError, match=words):
        dequantized_state(state, "file")


def test_a_denoiser_that_comfyui_has_no_names_for_is_refused() -> None:
    with pytest.raises(InputError, match="Linear"):
        comfyui_state(nn.Linear(2, 2))


def test_a_run_writes_the_file_and_it_is_a_model_again(tiny_sd: Path, tmp_path: Path) -> None:
    """The file is read with the pipeline's folder beside it, which names everything but the denoiser's weights."""
    run = tmp_path / "run"
    common = ["--run", str(run), "--device", "cpu", "--quiet"]
    collect = ["collect", "--model", str(tiny_sd), "--num-trajectories", "2", "--num-steps", "2"]
    assert main([*collect, *common]) == 0
    assert main(["select", *common]) == 0
    assert main(["reconstruct", "--bits", "w8a8", "--recipe", "rtn", *common]) == 0
    assert main(["export", "--bits", "w8a8", "--format", "comfyui", *common]) == 0
    assert main(["export", "--bits", "w8a8", "--format", "comfyui", "--engine", "openvino", *common]) == 2
    file = run / "engine" / "w8a8-comfyui" / "denoiser.safetensors"
    copied = tmp_path / "mine.safetensors"
    shutil.copy(file, copied)
    shutil.copytree(tiny_sd, tmp_path / "mine")
    loaded = load_model(str(copied), torch.device("cpu"), torch.float32).denoiser
    exported = load_model(str(run / "export" / "w8a8"), torch.device("cpu"), torch.float32).denoiser
    layers = quantized_layers(exported)
    assert len(layers) > 20
    for name, layer in layers.items():
        if ".part" not in name:
            weight = loaded.get_submodule(name).weight
            torch.testing.assert_close(weight, layer.weight.float(), rtol=1e-3, atol=1e-4)
