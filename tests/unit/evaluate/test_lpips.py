"""LPIPS from the package of its authors, with AlexNet's weights from a file."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torchvision.models import alexnet

from edadm_cli.errors import InputError, MachineError
from edadm_cli.metrics.lpips import Lpips, load_lpips
from edadm_cli.metrics.registry import metrics


class Images:
    """Images in two batches."""

    def __init__(self, images: torch.Tensor) -> None:
        self.images = images

    def pairs(self) -> Any:
        yield from ((part, part) for part in self.images.split(2))


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("lpips")
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("alexnet") / "alexnet.pth"
    with torch.device("meta"):
        shapes = {name: value.shape for name, value in alexnet().state_dict().items() if name.startswith("features")}
    torch.save({name: 0.1 * torch.randn(shape) for name, shape in shapes.items()}, path)
    return path


def test_equal_images_have_no_distance_and_others_have_one(weights: Path) -> None:
    metric = Lpips()
    network = metric.open(SimpleNamespace(lpips_weights=weights), torch.device("cpu"))
    images = torch.randint(0, 256, (3, 3, 64, 64), dtype=torch.uint8)
    changed = images.clone()
    changed[1] = 255 - changed[1]
    context: Any = SimpleNamespace(images=Images(changed), reference=Images(images))
    value = metric.compute(context, network)
    assert value.num_images == 3
    assert value.per_image[0] == value.per_image[2] == 0
    assert value.per_image[1] > 1e-3
    small: Any = SimpleNamespace(images=Images(images[..., :16]), reference=Images(images[..., :16]))
    with pytest.raises(InputError, match="32 pixels"):
        metric.compute(small, network)


def test_nothing_is_downloaded(weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    with pytest.raises(InputError) as error:
        load_lpips(None, torch.device("cpu"))
    assert "--lpips-weights" in str(error.value.hint)
    wrong = tmp_path / "wrong.pth"
    torch.save({"features.0.weight": torch.zeros(1)}, wrong)
    with pytest.raises(InputError, match="AlexNet"):
        load_lpips(wrong, torch.device("cpu"))


def test_without_the_package_it_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "lpips", None)
    with pytest.raises(MachineError) as error:
        load_lpips(None, torch.device("cpu"))
    assert error.value.hint == "pip install lpips"


def test_it_is_computed_only_where_it_is_named() -> None:
    assert not metrics()["lpips"].default_in("inception")
