"""The CUDA engine assembled on a CPU: every block against exact integers, with the kernels' torch reference."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from edadm_cli.calibrate.nearest import quantize_to_nearest
from edadm_cli.config import BitWidth
from edadm_cli.engines.base import EngineOptions
from edadm_cli.engines.cuda import CudaEngine
from edadm_cli.engines.cuda.denoiser import CudaDenoiser
from edadm_cli.engines.cuda.fused_blocks.assembly import Assembly
from edadm_cli.engines.cuda.fused_blocks.attention import FusedAttention, Projections
from edadm_cli.engines.cuda.fused_blocks.residual import FusedResidualBlock, FusedUpBlock
from edadm_cli.engines.cuda.fused_blocks.transformer import FusedTransformer2D, FusedTransformerBlock
from edadm_cli.engines.cuda.products.lowering import Lowering
from edadm_cli.engines.cuda.products.product import IntegerConv2d, IntegerLinear, Product
from edadm_cli.engines.parity import compare_layers, relative_l2
from edadm_cli.engines.reference import ReferenceEngine
from edadm_cli.models.random_models import example_call
from edadm_cli.quant.layers import QuantizedLayer, quantized_layer, quantized_layers
from edadm_cli.quant.plan import LayerPlan
from tests.denoisers.families import RECIPE

Call = tuple[tuple[Any, ...], dict[str, Any]]
CPU = EngineOptions(device=torch.device("cpu"))
HALF = EngineOptions(device=torch.device("cpu"), rest_dtype=torch.float16)
MODELS = {
    "tiny_sd": "UNet2DConditionModel",
    "tiny_ddpm": "UNet2DModel",
    "tiny_sdxl": "UNet2DConditionModel",
    "tiny_dit": "DiTTransformer2DModel",
}
# Both sums are exact and both epilogues float32. They differ only where the result of a normalization is so close to
# the middle between two codes that rounding decides: by one code of one element.
EXACT = 1e-3
# float16 rounds each hidden state by up to 2^-11, which changes some codes; in a network of 8 to 16 channels
# that is as much as quantization itself changes, and far from what a misplaced term would do.
ROUNDED = 0.1


def load(folder: Path, name: str) -> nn.Module:
    import diffusers

    part = "transformer" if (folder / "transformer").exists() else "unet"
    model: nn.Module = getattr(diffusers, MODELS[name]).from_pretrained(folder / part)
    return model.eval().requires_grad_(False)


@pytest.fixture(params=list(MODELS))
def network(request: pytest.FixtureRequest) -> tuple[nn.Module, Call]:
    """A denoiser of each kind, one with groups of four-bit weights and the others at W8A8, and a call of two rows."""
    denoiser = load(request.getfixturevalue(request.param), request.param)
    call = example_call(denoiser, batch_size=2)
    bits = "w4g16a8" if request.param == "tiny_sdxl" else "w8a8"
    quantize_to_nearest(denoiser, RECIPE, BitWidth.parse(bits), [call])
    return denoiser, call


def exact(denoiser: nn.Module, call: Call) -> Tensor:
    result: Tensor = ReferenceEngine().compile(denoiser, *call, CPU)(*call[0], **call[1])[0]
    return result


def test_all_of_a_denoiser_moves_to_the_device_of_the_kernels(network: tuple[nn.Module, Call]) -> None:
    """Operations refuse tensors of two devices; a kernel would read an address of the other one's memory."""
    denoiser, (args, kwargs) = network
    meta = torch.device("meta")
    assembly = Assembly(Lowering(meta, torch.float16), prompt_cache=True)
    model, layers = assembly.build(denoiser)
    options = EngineOptions(device=meta, rest_dtype=torch.float16)
    compiled = CudaDenoiser(model, layers, assembly.state, options, cuda_graphs=False)
    assert compiled.call_eagerly(*args, **kwargs)[0].device == meta


def test_a_float32_rest_gives_what_exact_integers_give(network: tuple[nn.Module, Call]) -> None:
    denoiser, call = network
    compiled = CudaEngine().compile(denoiser, *call, CPU)
    expected = denoiser(*call[0], **call[1])
    actual = compiled(*call[0], **call[1])
    assert type(actual) is type(expected)
    assert actual[0].dtype == expected[0].dtype
    assert relative_l2(actual[0], exact(denoiser, call)) < EXACT
    assert torch.equal(actual[0], compiled(*call[0], **call[1], return_dict=False)[0])
    assert [row.name for row in compiled.layers] == [row.name for row in _reference_rows(denoiser, call)]
    assert all(row.is_met and row.precision == "int8" for row in compiled.layers if row.planned != "float")


def test_a_float16_rest_stays_close(network: tuple[nn.Module, Call]) -> None:
    denoiser, call = network
    compiled = CudaEngine().compile(denoiser, *call, HALF)
    actual = compiled(*call[0], **call[1])[0]
    assert actual.dtype == torch.float32, "outputs have the inputs' type"
    assert 0 < relative_l2(actual, exact(denoiser, call)) < ROUNDED
    assert {row.precision for row in compiled.layers if row.planned == "float"} == {"float16"}


class Concatenations(TorchDispatchMode):
    """Counts copies that join images."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.cat.default and args[0][0].ndim == 4:
            self.count += 1
        return func(*args, **(kwargs or {}))


class Quantizations(TorchDispatchMode):
    """Counts the quantizations that are launched by themselves, of one image and of two."""

    def __init__(self) -> None:
        super().__init__()
        self.counts = {"quantize": 0, "quantize_joined": 0}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = str(func).removeprefix("edadm.").removesuffix(".default")
        if name in self.counts:
            self.counts[name] += 1
        return func(*args, **(kwargs or {}))


def test_only_resamplers_and_embeddings_are_quantized_by_themselves(tiny_sd: Path) -> None:
    """Normalizations write the codes of shortcuts, last products those of a transformer's output projection."""
    denoiser = load(tiny_sd, "tiny_sd")
    call = example_call(denoiser, batch_size=2)
    recipe = RECIPE.model_copy(update={"ranges": RECIPE.ranges.model_copy(update={"channel_parts": False})})
    quantize_to_nearest(denoiser, recipe, BitWidth.parse("w8a8"), [call])
    compiled = CudaEngine().compile(denoiser, *call, HALF)
    compiled.call_eagerly(*call[0], **call[1])
    with Quantizations() as actual:
        compiled.call_eagerly(*call[0], **call[1])
    blocks = (*denoiser.down_blocks, *denoiser.up_blocks)
    resamplers = sum(
        len(samplers)
        for block in blocks
        for name in ("downsamplers", "upsamplers")
        if (samplers := getattr(block, name, None))
    )
    assert actual.counts["quantize_joined"] == 0
    assert actual.counts["quantize"] == resamplers + 3, "the time embedding has two layers, and blocks project it"


@pytest.mark.parametrize(
    ("name", "in_parts"), [("tiny_sd", True), ("tiny_sd", False), ("tiny_ddpm", True), ("tiny_sdxl", True)]
)
def test_skip_connections_are_not_copied(name: str, in_parts: bool, request: pytest.FixtureRequest) -> None:
    denoiser = load(request.getfixturevalue(name), name)
    call = example_call(denoiser, batch_size=2)
    recipe = RECIPE.model_copy(update={"ranges": RECIPE.ranges.model_copy(update={"channel_parts": in_parts})})
    quantize_to_nearest(denoiser, recipe, BitWidth.parse("w8a8"), [call])
    compiled = CudaEngine().compile(denoiser, *call, HALF)
    assert all(isinstance(block, FusedUpBlock) for block in compiled.model.up_blocks)
    with Concatenations() as actual:
        compiled.call_eagerly(*call[0], **call[1])
    assert actual.count == 0


def test_blocks_that_change_their_skip_connections_concatenate(tiny_sd: Path) -> None:
    denoiser = load(tiny_sd, "tiny_sd")
    denoiser.enable_freeu(s1=0.9, s2=0.2, b1=1.2, b2=1.4)
    call = example_call(denoiser, batch_size=2)
    quantize_to_nearest(denoiser, RECIPE, BitWidth.parse("w8a8"), [call])
    compiled = CudaEngine().compile(denoiser, *call, CPU)
    assert not any(isinstance(block, FusedUpBlock) for block in compiled.model.up_blocks)
    actual, expected = compiled(*call[0], **call[1])[0], exact(denoiser, call)
    denoiser.disable_freeu()
    assert relative_l2(actual, expected) < 10 * EXACT < 0.1 * relative_l2(exact(denoiser, call), expected)


def test_the_denoiser_is_left_as_it_was(network: tuple[nn.Module, Call]) -> None:
    denoiser, call = network
    before = denoiser(*call[0], **call[1])[0]
    names = [name for name, _ in denoiser.named_modules()]
    CudaEngine().compile(denoiser, *call, HALF)
    assert [name for name, _ in denoiser.named_modules()] == names
    assert torch.equal(denoiser(*call[0], **call[1])[0], before)


def test_blocks_are_fused(quantized: nn.Module, call: Call) -> None:
    model = CudaEngine().compile(quantized, *call, CPU).model  # type: ignore[attr-defined]
    kinds = [type(module) for module in model.modules()]
    assert kinds.count(FusedResidualBlock) == _count(quantized, "ResnetBlock2D") > 0
    assert kinds.count(FusedTransformerBlock) == _count(quantized, "BasicTransformerBlock") > 0
    assert kinds.count(FusedTransformer2D) == _count(quantized, "Transformer2DModel") > 0
    assert kinds.count(FusedAttention) == _count(quantized, "Attention") > 0
    attentions = [module for module in model.modules() if isinstance(module, FusedAttention)]
    assert all(len(a.inputs.products) == 1 for a in attentions), "q, k and v of equal quantizers are one GEMM"


def test_four_bit_weights_split_shortcuts_and_quantized_attention(quantized: nn.Module, call: Call) -> None:
    compiled = CudaEngine().compile(quantized, *call, CPU)
    assert relative_l2(compiled(*call[0], **call[1])[0], exact(quantized, call)) < EXACT
    attention = [row for row in compiled.layers if row.kind == "attention"]
    assert attention
    assert all(row.precision == "float32" and row.reason for row in attention)
    assert all(row.is_met for row in compiled.layers if row.kind != "attention")


def test_layers_over_one_input_may_have_scales_of_their_own(quantized: nn.Module, call: Call) -> None:
    with torch.no_grad():
        for index, (name, layer) in enumerate(quantized_layers(quantized).items()):
            if name.endswith(("to_q", "to_v", "to_k", "time_emb_proj")):
                layer.input_scale *= 1 + 0.05 * (index % 3)
                layer.input_zero_point += index % 2
    compiled = CudaEngine().compile(quantized, *call, CPU)
    assert relative_l2(compiled(*call[0], **call[1])[0], exact(quantized, call)) < EXACT
    model = compiled.model  # type: ignore[attr-defined]
    clusters = [len(m.inputs.products) for m in model.modules() if isinstance(m, FusedAttention)]
    assert max(clusters) > 1


@pytest.mark.parametrize(("rows", "size"), [(1, 8), (3, 16), (2, 6), (1, 9)])
def test_other_batches_and_sizes(quantized: nn.Module, call: Call, rows: int, size: int) -> None:
    from tests.unit.engines.conftest import call_of

    compiled = CudaEngine().compile(quantized, *call, CPU)
    others = [call_of(seed=seed, rows=rows, size=size) for seed in (3, 4, 5)]
    errors = [relative_l2(compiled(*other[0], **other[1])[0], exact(quantized, other)) for other in others]
    # Sums in another order turn a single code of about one input in ten, which a network this small feels.
    assert sorted(errors)[1] < EXACT
    assert max(errors) < 3e-2


def test_every_layer_is_within_its_bound(quantized: nn.Module, call: Call) -> None:
    parity = compare_layers(CudaEngine(), quantized, *call, CPU)
    assert not parity.refused
    assert len(parity.errors) == parity.num_layers
    assert parity.worst[1] <= CudaEngine.layer_bound


def test_keys_and_values_follow_the_prompt(quantized: nn.Module, call: Call) -> None:
    compiled = CudaEngine().compile(quantized, *call, CPU)
    args, kwargs = call
    first = compiled(*args, **kwargs)[0]
    other = {"encoder_hidden_states": torch.flip(kwargs["encoder_hidden_states"], [1]) * 0.5}
    assert relative_l2(compiled(*args, **other)[0], exact(quantized, (args, other))) < EXACT
    assert torch.equal(compiled(*args, **kwargs)[0], first)
    kwargs["encoder_hidden_states"].mul_(0.5)
    assert relative_l2(compiled(*args, **kwargs)[0], exact(quantized, call)) < EXACT
    assert not torch.equal(compiled(*args, **kwargs)[0], first)


def test_a_prompt_is_projected_once(quantized: nn.Module, call: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    compiled = CudaEngine().compile(quantized, *call, CPU)
    compiled(*call[0], **call[1])
    seen: list[Tensor] = []
    monkeypatch.setattr(FusedAttention, "_pair", lambda self, context: seen.append(context))
    compiled(call[0][0] + 1, torch.tensor(2), **call[1])
    assert not seen


def test_a_timestep_may_be_a_number(quantized: nn.Module, call: Call) -> None:
    (sample, timestep), kwargs = call
    compiled = CudaEngine().compile(quantized, *call, CPU)
    assert torch.equal(compiled(sample, int(timestep), **kwargs)[0], compiled(sample, timestep, **kwargs)[0])


def test_the_profile_names_layers(quantized: nn.Module, call: Call) -> None:
    rows = CudaEngine().compile(quantized, *call, CPU).profile(*call[0], **call[1])
    assert any(row.name.startswith("mid_block.resnets.0.conv1: ") and row.precision == "int8" for row in rows)
    assert {"conv2d", "linear", "norm", "attention"} <= {row.kind for row in rows}
    assert all(row.milliseconds >= 0 for row in rows)


def test_the_profile_of_a_cpu_has_its_operations_on_a_machine_with_a_gpu(
    quantized: nn.Module, call: Call, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiled = CudaEngine().compile(quantized, *call, CPU)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda *_: None)
    assert compiled.profile(*call[0], **call[1])


LAYERS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], bool]] = {
    "linear": (lambda: nn.Linear(20, 12), (2, 5, 20), True),
    "linear-long": (lambda: nn.Linear(256, 24, bias=False), (3, 256), True),
    "conv3x3": (lambda: nn.Conv2d(6, 10, 3, padding=1), (2, 6, 7, 5), True),
    "conv3x3-wide": (lambda: nn.Conv2d(128, 16, 3, padding=1), (1, 128, 4, 4), True),
    "conv-stride": (lambda: nn.Conv2d(6, 10, 3, stride=2, padding=1), (2, 6, 7, 6), True),
    "conv-unpadded": (lambda: nn.Conv2d(6, 10, 3, stride=2), (1, 6, 9, 9), True),
    "conv1x1": (lambda: nn.Conv2d(12, 8, 1), (2, 12, 3, 4), True),
    "patches": (lambda: nn.Conv2d(4, 16, 2, stride=2), (2, 4, 6, 6), True),
    "groups": (lambda: nn.Conv2d(8, 8, 3, padding=1, groups=4), (1, 8, 5, 5), False),
    "dilation": (lambda: nn.Conv2d(4, 8, 3, padding=2, dilation=2), (1, 4, 7, 7), False),
    "taps": (lambda: nn.Conv2d(4, 8, 7, padding=3), (1, 4, 7, 7), False),
    "strides": (lambda: nn.Conv2d(4, 8, 3, stride=(1, 2)), (1, 4, 7, 7), False),
}


@pytest.mark.parametrize("bits", [(8, 8), (4, 8), (4, 6)])
@pytest.mark.parametrize("name", list(LAYERS))
def test_a_layer_of_each_kind(name: str, bits: tuple[int, int]) -> None:
    make, shape, runs = LAYERS[name]
    layer, x = filled(make(), *bits, shape=shape)
    expected = layer_exactly(layer, x)
    for engine in (CudaEngine(), CudaEngine(pack_weights=True)):
        assert (engine.layer_refusal(layer) is None) == runs
        assert relative_l2(engine.compile_layer(layer, x, CPU)(x), expected) <= engine.layer_bound
    channels_last = x.to(memory_format=torch.channels_last) if x.ndim == 4 else x
    assert relative_l2(CudaEngine().compile_layer(layer, x, CPU)(channels_last), expected) <= CudaEngine.layer_bound


def test_packed_weights_take_half_the_memory_and_give_the_same() -> None:
    layer, x = filled(nn.Linear(256, 64), 4, 8, shape=(3, 256))
    products = []
    for engine in (CudaEngine(), CudaEngine(pack_weights=True)):
        products.append(engine._lowering(CPU).product("", layer))
    assert all(isinstance(product, IntegerLinear) for product in products)
    assert products[1].weight.numel() * 2 == products[0].weight.numel()  # type: ignore[operator]
    assert torch.equal(products[0](x), products[1](x))


def test_packed_and_unpacked_weights_over_one_input_are_one_product() -> None:
    layers = [filled(nn.Linear(128, 8), bits, 8, shape=(3, 128)) for bits in (4, 8)]
    lowering, x = CudaEngine(pack_weights=True)._lowering(CPU), layers[0][1]
    projections = Projections([lowering.product("", layer) for layer, _ in layers])
    assert len(projections.products) == 1
    for actual, (layer, _) in zip(projections.of(x), layers, strict=True):
        assert relative_l2(actual, layer_exactly(layer, x)) <= CudaEngine.layer_bound


def test_attention_in_eight_bits_that_cannot_run_is_listed_in_float_with_the_reason(
    denoiser: nn.Module, call: Call
) -> None:
    quantize_to_nearest(denoiser, RECIPE, BitWidth.parse("w8a8"), [call])
    rows = CudaEngine().compile(denoiser, *call, replace(CPU, attention="int8")).layers
    attention = [row for row in rows if row.kind == "attention"]
    assert attention
    assert all(row.precision == "float32" and "capability 9.0" in (row.reason or "") for row in attention)


@pytest.mark.parametrize(("dtype", "runs"), [(torch.float16, True), (torch.float32, False)])
def test_attention_on_grids_counts_as_integer_only_where_its_kernel_takes_the_operands(
    quantized: nn.Module, dtype: torch.dtype, runs: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("edadm_kernels.hopper.attention_int8.WIDTHS", range(1, 65))
    _, layers = Assembly(Lowering(torch.device("meta"), dtype), prompt_cache=True).build(quantized)
    precisions = {row.precision for row in layers if row.kind == "attention"}
    assert precisions == {"int8" if runs else "float32"}


def test_a_float_input_is_refused_with_the_reason() -> None:
    layer, x = filled(nn.Linear(8, 4), 8, None, shape=(2, 8))
    assert CudaEngine().layer_refusal(layer) == "its input stays in floating point"
    assert relative_l2(CudaEngine().compile_layer(layer, x, CPU)(x), layer(x)) < CudaEngine.layer_bound


def test_upsampling_is_folded_into_the_convolution(quantized: nn.Module, call: Call) -> None:
    seen: list[bool] = []
    compiled = CudaEngine().compile(quantized, *call, CPU)
    original = IntegerConv2d.product

    def note(self: Product, *args: Any, upsample: bool = False, **kwargs: Any) -> Tensor:
        seen.append(upsample)
        result: Tensor = original(self, *args, upsample=upsample, **kwargs)  # type: ignore[arg-type]
        return result

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(IntegerConv2d, "product", note)
        compiled(*call[0], **call[1])
    assert sum(seen) == _count(quantized, "Upsample2D") > 0


def test_a_machine_without_cuda_is_refused() -> None:
    engine = CudaEngine()
    assert engine.refusal(torch.device("cpu")) is None
    assert "runs on CUDA devices" in (engine.refusal(torch.device("mps")) or "")
    if not torch.cuda.is_available():
        assert "this machine has none" in (engine.refusal(torch.device("cuda")) or "")


def filled(
    module: nn.Module, weight: int, activation: int | None, shape: tuple[int, ...]
) -> tuple[QuantizedLayer, Tensor]:
    """A layer with random codes, off-centre inputs and an input for it."""
    generator = torch.Generator().manual_seed(7)
    plan = LayerPlan(weight_bits=weight, activation_bits=activation)
    layer = quantized_layer(module, plan)
    assert isinstance(layer, QuantizedLayer)
    grid = plan.weight_grid
    codes = torch.randint(grid.quant_min, grid.quant_max + 1, layer.weight_shape, generator=generator)
    scales = torch.rand(layer.weight_shape[0], generator=generator) * 0.01 + 0.001
    x = torch.randn(shape, generator=generator) + 0.3
    layer.set_parameters(codes, scales, torch.tensor(0.02), torch.tensor(90 if activation == 8 else 25))
    return layer, x


def layer_exactly(layer: QuantizedLayer, x: Tensor) -> Tensor:
    copied = copy.deepcopy(layer)
    copied.arithmetic = "integer"
    with torch.no_grad():
        return copied(x)


def _count(model: nn.Module, name: str) -> int:
    return sum(type(module).__name__ == name for module in model.modules())


def _reference_rows(denoiser: nn.Module, call: Call) -> tuple[Any, ...]:
    return ReferenceEngine().compile(denoiser, *call, CPU).layers
