"""Products that activate their outputs and write them as codes, exchanged in the graphs that torch compiles."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from peft import LoraConfig
from torch import Tensor, fx, nn
from torch._inductor import config
from torch._inductor.compile_fx import compile_fx

import edadm_kernels as kernels
from edadm_cli.engines.cuda.compiled.layer_product import KernelProduct
from edadm_cli.engines.cuda.graph_passes import attention_graph, joined_graph
from edadm_cli.engines.cuda.graph_passes.graph_exchange import exchange
from edadm_cli.engines.parity import relative_l2
from edadm_cli.integrations.methods import bind_methods
from edadm_cli.models.denoiser_calls.predictions import prediction_of
from edadm_cli.quant.layers import QuantizedLayer
from edadm_cli.quant.network import deploy
from tests.denoisers.families import Call, quantized_denoiser

COMPILED = 3e-2  # single codes of a network of 8 channels differ
GELU, GEGLU = "edadm.linear_gelu_to_codes.default", "edadm.linear_geglu_to_codes.default"
OPERATIONS = {"unet": GEGLU, "dit": GELU, "pixart": GELU, "sd3": GELU, "flux": GELU}


@pytest.fixture(autouse=True)
def _fresh_compiler(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(kernels, "gelu_pays", lambda *_: True)
    monkeypatch.setattr(kernels, "geglu_pays", lambda *_: True)
    torch._dynamo.reset()
    with config.patch(pre_grad_custom_pass=None):
        yield
    torch._dynamo.reset()


def deployed(family: str) -> tuple[nn.Module, Call]:
    denoiser, call = quantized_denoiser(family)
    bind_methods(denoiser)
    deploy(denoiser, KernelProduct(("cpu",)))
    return denoiser, call


@torch.no_grad()
def exchanged(model: nn.Module, call: Call, by_inductor: bool = False) -> list[str]:
    """Compiles a model, compares its prediction with that of eager torch, and returns the operations of its graph."""
    operations: list[str] = []

    def collect(graph: fx.GraphModule, inputs: list[Any], **_: Any) -> Callable[..., Any]:
        operations.extend(str(node.target) for node in graph.graph.nodes)
        return graph

    def backend(graph: fx.GraphModule, inputs: list[Any]) -> Callable[..., Any]:
        if by_inductor:
            return compile_fx(graph, inputs, inner_compile=collect)  # type: ignore[return-value]
        exchange(graph.graph)
        graph.graph.lint()
        graph.recompile()
        return collect(graph, inputs).forward  # type: ignore[attr-defined, no-any-return]

    expected = prediction_of(model(*call[0], **call[1]))
    prediction = prediction_of(torch.compile(model, fullgraph=True, backend=backend)(*call[0], **call[1]))
    assert relative_l2(prediction, expected) < COMPILED
    return operations


def feed_forwards(model: nn.Module) -> list[Any]:
    modules: list[Any] = [module for module in model.modules() if type(module).__name__ == "FeedForward"]
    layers = [(module.net[0].proj, module.net[2]) for module in modules]
    assert all(isinstance(layer, QuantizedLayer) for pair in layers for layer in pair)
    return modules


@pytest.mark.parametrize("family", OPERATIONS)
def test_feed_forward_layers_of_every_family_take_two_products(family: str) -> None:
    denoiser, call = deployed(family)
    operations = exchanged(denoiser, call, by_inductor=family == "pixart")
    modules = feed_forwards(denoiser)
    assert modules
    prompt: Any = getattr(denoiser, "caption_projection", None)  # of PixArt, with the same activation
    of_prompt = prompt is not None and isinstance(prompt.linear_2, QuantizedLayer)
    assert operations.count(OPERATIONS[family]) == len(modules) + of_prompt


def single_blocks(model: nn.Module) -> int:
    blocks: Any = [module for module in model.modules() if type(module).__name__ == "FluxSingleTransformerBlock"]
    return sum(isinstance(block.proj_out, QuantizedLayer) for block in blocks)


def test_both_halves_of_single_stream_blocks_meet_as_codes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(joined_graph, "_STEP", 1)
    monkeypatch.setattr(attention_graph, "attend_pays", lambda *_: True)
    denoiser, call = deployed("flux")
    operations = exchanged(denoiser, call)
    count = single_blocks(denoiser)
    assert count
    assert operations.count("edadm.linear_joined.default") == count
    assert operations.count(GELU) == len(feed_forwards(denoiser)) + count


def test_an_adapter_in_a_single_stream_block_has_its_effect(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(joined_graph, "_STEP", 1)
    for layer, is_joined in {"proj_mlp": False, "attn.to_q": True}.items():
        torch._dynamo.reset()
        denoiser, call = deployed("flux")
        before = prediction_of(denoiser(*call[0], **call[1]))
        adapt(denoiser, layer)
        operations = exchanged(denoiser, call)
        assert ("edadm.linear_joined.default" in operations) == is_joined
        assert relative_l2(prediction_of(denoiser(*call[0], **call[1])), before) > 1e-3, "the adapter has an effect"


class AsDenoiser(nn.Module):
    """A part of a denoiser that is called with one tensor."""

    def __init__(self, part: nn.Module) -> None:
        super().__init__()
        self.part = part

    def forward(self, x: Tensor) -> tuple[Tensor]:
        """Returns the output as a denoiser does."""
        return (self.part(x),)


def alone(part: nn.Module, width: int) -> tuple[nn.Module, Call]:
    """A part by itself, and a call of it."""
    return AsDenoiser(part), ((torch.randn(2, 8, width, generator=torch.Generator().manual_seed(0)),), {})


def first_feed_forward(denoiser: nn.Module) -> tuple[Any, int]:
    module = feed_forwards(denoiser)[0]
    return module, module.net[0].proj.in_features


@pytest.mark.parametrize(("pays", "family"), [("gelu_pays", "pixart"), ("geglu_pays", "unet")])
def test_what_is_not_faster_stays(pays: str, family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    denoiser, _ = deployed(family)
    part = alone(*first_feed_forward(denoiser))
    assert OPERATIONS[family] in exchanged(*part)
    torch._dynamo.reset()
    monkeypatch.setattr(kernels, pays, lambda *_: False)
    assert not {GELU, GEGLU} & set(exchanged(*part))


def adapt(denoiser: Any, layer: str) -> None:
    denoiser.add_adapter(LoraConfig(r=2, target_modules=[layer], init_lora_weights=False), "style")


@pytest.mark.parametrize("layer", ["net.0.proj", "net.2"])
@pytest.mark.parametrize("family", ["sd3", "unet"])
def test_an_adapter_of_either_layer_keeps_the_activation_where_it_is(family: str, layer: str) -> None:
    denoiser, _ = deployed(family)
    module, width = first_feed_forward(denoiser)
    model, call = alone(module, width)
    before = model(*call[0])[0]
    adapt(denoiser, layer)
    assert not {GELU, GEGLU} & set(exchanged(model, call))
    assert relative_l2(model(*call[0])[0], before) > COMPILED, "the adapter has an effect"


@pytest.mark.parametrize("layer", ["net.0.proj", "net.0", "net.1"])
@pytest.mark.parametrize("family", ["pixart", "unet"])
def test_a_hook_between_both_layers_keeps_the_activation_where_it_is(family: str, layer: str) -> None:
    module, width = first_feed_forward(deployed(family)[0])
    module.get_submodule(layer).register_forward_hook(lambda module, args, output: output + 0.5)
    assert not {GELU, GEGLU} & set(exchanged(*alone(module, width)))


class Feeding(nn.Module):
    """Two layers of a feed-forward with a choice of what is between them."""

    def __init__(self, layers: tuple[nn.Module, nn.Module], between: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.first, self.second = layers
        self.between = between

    def forward(self, x: Tensor) -> Tensor:
        """Returns the output of both layers."""
        return self.second(self.between(self.first(x)))  # type: ignore[no-any-return]


def halves(y: Tensor) -> tuple[Tensor, Tensor]:
    first, second = y.chunk(2, dim=-1)
    return first, second


gelu = nn.functional.gelu
FORMS: dict[str, tuple[Callable[[Tensor], Tensor], str | None]] = {
    "gated": (lambda y: halves(y)[0] * gelu(halves(y)[1]), None),  # two pairs of halves
    "as GEGLU": (lambda y: (lambda value, gate: value * gelu(gate))(*halves(y)), GEGLU),
    "gates first": (lambda y: (lambda gate, value: value * gelu(gate))(*halves(y)), None),
    "gate read twice": (lambda y: (lambda value, gate: (value + gate) * gelu(gate))(*halves(y)), None),
    "gate approximated": (lambda y: (lambda value, gate: value * gelu(gate, approximate="tanh"))(*halves(y)), None),
}


@pytest.mark.parametrize("form", FORMS)
def test_only_the_form_of_the_kernel_is_exchanged(form: str) -> None:
    module, width = first_feed_forward(deployed("unet")[0])
    between, operation = FORMS[form]
    operations = exchanged(*alone(Feeding((module.net[0].proj, module.net[2]), between), width))
    assert {GELU, GEGLU} & set(operations) == ({operation} if operation else set())
