"""Transformers with complex rotary embeddings in OpenVINO, and graphs that fit only some calls."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from edadm_cli.calibrate.nearest import quantize_to_nearest
from edadm_cli.config import BitWidth
from edadm_cli.engines.base import EngineOptions
from edadm_cli.engines.openvino import OpenVinoEngine
from edadm_cli.engines.openvino.traced_forms import ComplexOperationError, TracedForms
from edadm_cli.engines.parity import relative_l2
from edadm_cli.engines.reference import use_arithmetic
from edadm_cli.errors import EdadmError, InputError
from edadm_cli.models.random_models import initialize
from tests.denoisers.families import RECIPE
from tests.denoisers.transformers import lumina2, z_image

CPU = EngineOptions(torch.device("cpu"), num_threads=1)
FLOAT_BOUND = 1e-5
CODE_BOUND = 0.05  # in these tiny networks, one code that goes to the other side of a tie is felt at the output

Call = tuple[tuple[Any, ...], dict[str, Any]]


def _z_image(lengths: list[int], size: int = 8) -> Call:
    images = [torch.randn(4, 1, size, size) for _ in lengths]
    texts = [torch.randn(length, 32) for length in lengths]
    return (images, torch.full((len(lengths),), 0.3), texts), {}


def _lumina2(lengths: list[int], size: int = 8) -> Call:
    rows, longest = len(lengths), 40
    mask = (torch.arange(longest)[None, :] < torch.tensor(lengths)[:, None]).long()
    states = torch.randn(rows, longest, 32)
    sample, timestep = torch.randn(rows, 4, size, size), torch.full((rows,), 0.3)
    return (sample, timestep, states, mask), {}


CALLS: dict[str, Callable[..., Call]] = {"z_image": _z_image, "lumina2": _lumina2}


def _network(name: str) -> nn.Module:
    denoiser: nn.Module = {"z_image": z_image, "lumina2": lumina2}[name]().transformer.eval().requires_grad_(False)
    initialize(denoiser, 0)
    return denoiser


@torch.no_grad()
def _prediction(denoiser: Callable[..., Any], call: Call) -> Tensor:
    rows: Tensor = denoiser(*call[0], **call[1])[0]
    return torch.stack(list(rows))


def test_complex_numbers_are_computed_in_real_ones() -> None:
    torch.manual_seed(0)
    table = torch.polar(torch.ones(9, 3), torch.arange(27.0).view(9, 3))
    x, index = torch.randn(2, 4, 5, 12), torch.tensor([3, 1, 0, 8])

    def rotated() -> Tensor:
        rows = torch.zeros(2, 4, 3, dtype=table.dtype)
        rows[0, :2], rows[1] = table[index[:2]], table[index]
        gathered = torch.gather(table.unsqueeze(0).repeat(2, 1, 1), 1, index[None, :, None].repeat(2, 1, 3))
        factors = torch.cat([rows, gathered], dim=-1).to(torch.complex64).unsqueeze(2)
        pairs = torch.view_as_complex(x.reshape(*x.shape[:-1], -1, 2))
        return torch.view_as_real(pairs * factors).flatten(3)

    expected = rotated()
    with TracedForms():
        actual = rotated()
        with pytest.raises(ComplexOperationError, match="computes exp of complex numbers"):
            table.exp()
        with pytest.raises(ComplexOperationError, match="computes complex numbers with fft_fft"):
            torch.fft.fft(x)
    assert torch.allclose(actual, expected, atol=1e-6)


@pytest.mark.parametrize("name", CALLS)
def test_a_graph_of_full_precision_predicts_the_same(name: str) -> None:
    """The denoiser reads the lengths of its texts, so it is converted again for other lengths and rows."""
    denoiser, call_of = _network(name), CALLS[name]
    torch.manual_seed(0)
    compiled = OpenVinoEngine().compile(denoiser, *call_of([5, 9]), CPU)
    for call in (call_of([5, 9]), call_of([7], size=12)):
        expected = _prediction(denoiser, call)
        actual = _prediction(compiled, call)
        assert actual.shape == expected.shape
        assert relative_l2(actual, expected) < FLOAT_BOUND


def test_w8a8_codes_are_those_of_exact_integers(tmp_path: Path) -> None:
    denoiser, call_of = _network("z_image"), _z_image
    torch.manual_seed(0)
    call = call_of([7])
    with torch.no_grad():
        quantize_to_nearest(denoiser, RECIPE, BitWidth.parse("w8a8"), [call])
    use_arithmetic(denoiser, "integer")
    engine = OpenVinoEngine()
    engine.save(denoiser, *call, CPU, tmp_path)
    compiled = engine.load(tmp_path, CPU)
    assert relative_l2(_prediction(compiled, call), _prediction(denoiser, call)) < CODE_BOUND
    assert all(layer.is_met or layer.reason for layer in compiled.layers)
    for other, words in ((call_of([7, 7]), "2 rows"), (call_of([8]), "other values of")):
        with pytest.raises(InputError, match=words):
            compiled(*other[0])


class _Branching(nn.Module):
    """Computes what the values of its sample say."""

    def forward(self, sample: Tensor, timestep: Tensor) -> tuple[Tensor]:
        return (sample * 2 if sample.sum() > 0 else sample,)


def test_a_denoiser_whose_computation_depends_on_its_sample_is_refused() -> None:
    call = (torch.ones(1, 4, 4, 4), torch.tensor([1.0])), {}
    with pytest.raises(EdadmError, match="depends on values of sample") as error:
        OpenVinoEngine().compile(_Branching(), *call, CPU)
    assert "engine='torch'" in error.value.hint


class _Sized(nn.Module):
    """Adds a table whose length it reads from its sample, as Qwen-Image does."""

    def forward(self, sample: Tensor, timestep: Tensor) -> tuple[Tensor]:
        return (sample + torch.arange(4.0).repeat(int(sample.shape[2]) // 4)[:, None],)


def test_a_denoiser_that_reads_sizes_is_converted_again_for_others() -> None:
    denoiser, timestep = _Sized(), torch.tensor([1.0])
    compiled = OpenVinoEngine().compile(denoiser, (torch.ones(1, 4, 4, 4), timestep), {}, CPU)
    other = (torch.ones(1, 4, 8, 4), timestep), {}
    assert torch.equal(_prediction(compiled, other), _prediction(denoiser, other))


def test_a_call_that_no_graph_can_be_made_for_is_one_sentence_with_both_reasons() -> None:
    denoiser, timestep = _Sized(), torch.tensor([1.0])
    compiled = OpenVinoEngine().compile(denoiser, (torch.ones(1, 4, 4, 4), timestep), {}, CPU)
    reasons = (
        r"does not fit inputs of sample \[1, 4, 6, 4\], .*, and no other graph can be made: .* must match the size"
    )
    for _ in range(2):
        with pytest.raises(InputError, match=reasons) as caught:
            compiled(torch.ones(1, 4, 6, 4), timestep)
        assert "\n" not in caught.value.message
        assert "engine='torch'" in (caught.value.hint or "")
    other = (torch.ones(1, 4, 8, 4), timestep), {}
    assert torch.equal(_prediction(compiled, other), _prediction(denoiser, other)), "it still takes other calls"


class _Masked(nn.Module):
    """Puts the tokens that a mask chooses first, as HunyuanImage does, and attends with the mask, as Krea 2 does."""

    def forward(self, sample: Tensor, timestep: Tensor, states: Tensor, mask: Tensor) -> tuple[Tensor]:
        tokens = torch.stack([torch.cat([row[keep], row[~keep]]) for row, keep in zip(states, mask, strict=True)])
        ordered = mask.sort(dim=1, descending=True, stable=True).values[:, None, None]
        queries = sample.flatten(2).transpose(1, 2)[:, None]
        attended = nn.functional.scaled_dot_product_attention(queries, tokens[:, None], tokens[:, None], ordered)
        return (attended[:, 0].transpose(1, 2).reshape(sample.shape),)


def test_boolean_masks_stay_boolean_and_choose_tokens() -> None:
    torch.manual_seed(0)
    denoiser, timestep = _Masked(), torch.tensor([1.0])

    def call_of(*masks: list[bool]) -> Call:
        rows = len(masks)
        return (torch.randn(rows, 8, 4, 4), timestep, torch.randn(rows, 4, 8), torch.tensor(masks)), {}

    first = call_of([True, False, True, True], [False, True, False, False])
    compiled = OpenVinoEngine().compile(denoiser, *first, CPU)
    for call in (first, call_of([True, True, False, False])):  # the graph is made again for other masks
        expected = denoiser(*call[0])[0]
        assert relative_l2(compiled(*call[0])[0], expected) < FLOAT_BOUND


class _Packed(nn.Module):
    """Packs the tokens that masks choose in all the ways that the transformers of recent pipelines do."""

    def forward(self, sample: Tensor, timestep: Tensor, mask: Tensor) -> tuple[Tensor]:
        tokens = sample.flatten(2).transpose(1, 2)  # [R, L, C]
        numbers = torch.where(mask[0], 2, 1)
        joint = tokens.repeat_interleave(numbers, dim=1)  # as in Qwen-Image 2.1
        twice = torch.repeat_interleave(mask[0], numbers)
        joint[:, twice] = joint[:, twice] + 1
        chosen = torch.nonzero(mask[0], as_tuple=False).flatten()  # as in Mochi
        padding = torch.ones_like(mask).masked_fill(~mask, False)  # as in HunyuanVideo
        first = tokens[:, chosen].sum(dim=1, keepdim=True)
        repeated = first.repeat_interleave(tokens.shape[1], dim=1) * padding[..., None]  # as in Stable Video Diffusion
        return (torch.cat([joint, repeated], dim=1),)


def test_tokens_that_masks_repeat_choose_and_write_to_are_those_of_torch() -> None:
    torch.manual_seed(0)
    denoiser, timestep = _Packed(), torch.tensor([1.0])

    def call_of(*mask: bool) -> Call:
        return (torch.randn(2, 8, 2, 2), timestep, torch.tensor([mask] * 2)), {}

    first = call_of(True, False, True, True)
    compiled = OpenVinoEngine().compile(denoiser, *first, CPU)
    for call in (first, call_of(False, True, False, False)):  # the graph is made again for other masks
        assert relative_l2(compiled(*call[0])[0], denoiser(*call[0])[0]) < FLOAT_BOUND


class _Frames(nn.Module):
    """Adds an embedding of the frames of a clip, which is the same in every call."""

    def __init__(self) -> None:
        super().__init__()
        self.start, self.embed, self.inner, self.end = (nn.Linear(16, 16) for _ in range(4))

    def forward(self, sample: Tensor, timestep: Tensor) -> tuple[Tensor]:
        angles = torch.arange(sample.shape[1])[:, None] * torch.arange(1.0, 17.0)[None] / 16
        return (self.end(self.inner(self.start(sample) + self.embed(angles.sin()))),)


@torch.no_grad()
def test_a_layer_whose_input_is_the_same_in_every_call_is_computed_with_its_codes() -> None:
    torch.manual_seed(0)
    denoiser = _Frames().eval().requires_grad_(False)
    call = (torch.randn(2, 4, 16), torch.tensor([1.0, 1.0])), {}
    quantize_to_nearest(denoiser, RECIPE, BitWidth.parse("w8a8"), [call])
    use_arithmetic(denoiser, "integer")
    compiled = OpenVinoEngine().compile(denoiser, *call, CPU)
    for frames in (4, 6):
        other = (torch.randn(1, frames, 16), torch.tensor([1.0])), {}
        assert relative_l2(_prediction(compiled, other), _prediction(denoiser, other)) < CODE_BOUND
    layers = {layer.name: layer for layer in compiled.layers}
    assert "the same in every call" in (layers["embed"].reason or "")
    assert layers["inner"].is_met


class _WithSound(nn.Module):
    """Predicts a clip and its sound, as LTX-2 does."""

    def forward(self, sample: Tensor, timestep: Tensor) -> tuple[Tensor, Tensor]:
        return sample * 2, sample.mean(dim=1)


def test_a_denoiser_that_predicts_a_sound_too_is_refused() -> None:
    call = (torch.ones(1, 4, 4, 4), torch.tensor([1.0])), {}
    with pytest.raises(EdadmError, match="predicts 2 tensors at once") as error:
        OpenVinoEngine().compile(_WithSound(), *call, CPU)
    assert "engine='torch'" in error.value.hint


class _Cut(nn.Module):
    """Cuts a text to the length that its mask of floating-point numbers says, as HunyuanVideo 1.5 does."""

    def forward(
        self, sample: Tensor, timestep: Tensor, states: Tensor, encoder_attention_mask: Tensor
    ) -> tuple[Tensor]:
        return (sample + states[:, : int(encoder_attention_mask.sum())].mean(dim=1, keepdim=True),)


def test_the_values_of_a_mask_of_floating_point_numbers_may_be_read() -> None:
    torch.manual_seed(0)
    denoiser, timestep, states = _Cut(), torch.tensor([1.0]), torch.randn(1, 5, 4)
    first, other = (
        ((torch.ones(1, 3, 4), timestep, states, torch.tensor([[1.0] * length + [0.0] * (5 - length)])), {})
        for length in (2, 4)
    )
    compiled = OpenVinoEngine().compile(denoiser, *first, CPU)
    for call in (first, other):
        assert relative_l2(_prediction(compiled, call), _prediction(denoiser, call)) < FLOAT_BOUND
