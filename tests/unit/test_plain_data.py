"""Configuration files that are damaged or made to hurt: one sentence, at once, whatever they hold."""

from __future__ import annotations

import errno
import time
from pathlib import Path

import accelerate  # noqa: F401 - so that its import is not timed
import pytest
import yaml
from diffusers import AutoencoderKL, UNet2DConditionModel, VQModel  # noqa: F401

from edadm_cli.cli.settings import read_config_file
from edadm_cli.errors import EXIT_INPUT, EXIT_USAGE, EdadmError, MachineError
from edadm_cli.models.checkpoints.accounting import empty_module
from edadm_cli.models.checkpoints.compvis_config import read_config
from edadm_cli.recipe import load_recipe
from tests.unit.models.configs import tiny

AT_ONCE = 10.0  # seconds of processor time, which other work does not lengthen; a hang takes minutes

TOML = {
    "an impossible date": "name = 2024-13-45",
    "a date": "name = 2024-01-02",
    "5,000 digits": "[learn]\niterations = " + "9" * 5000,
    "beyond 2^63": "[learn]\niterations = 9223372036854775808",
    "beyond float": "[learn]\nlayer_loss_weight = 1e999",
    "nested lists": "name = " + "[" * 3000 + "]" * 3000,
    "nested tables": "a." * 3000 + "a = 1",
    "a name of a megabyte": '"' + "a" * 2**20 + '" = 1',
    "a long name": '"' + "a" * 200_000 + '" = 1',
    "many keys": "".join(f"k{number} = 1\n" for number in range(20_000)),
    "a base that is a date": "extends = 2024-01-02",
    "a base that no file can be": f'extends = "{"a" * 3000}"',
    "a base that is a number": "extends = 7",
    "bytes": "\udcff",
    "a table for a name": "[name]\na = 1",
}


def refused(read: object, *arguments: object) -> EdadmError:
    started = time.process_time()
    with pytest.raises(EdadmError) as caught:
        read(*arguments)  # type: ignore[operator]
    assert caught.value.exit_code in (EXIT_INPUT, EXIT_USAGE)
    assert len(caught.value.message) < 5000
    assert time.process_time() - started < AT_ONCE
    return caught.value


@pytest.mark.parametrize("kind", sorted(TOML))
def test_a_recipe_or_a_configuration_that_hurts_is_refused_at_once(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "file.toml"
    path.write_text(TOML[kind], encoding="utf-8", errors="surrogateescape")
    assert refused(load_recipe, str(path)).exit_code == EXIT_USAGE
    assert refused(read_config_file, path).exit_code == EXIT_USAGE


def test_an_integer_of_thousands_of_digits_is_described_without_advice_to_programmers(tmp_path: Path) -> None:
    path = tmp_path / "file.toml"
    path.write_text(TOML["5,000 digits"], encoding="utf-8")
    message = refused(read_config_file, path).message
    assert message.endswith("is not readable TOML: it holds an integer of thousands of digits.")


def test_a_file_that_may_not_be_read_is_for_the_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def deny(self: Path) -> bytes:  # permissions do not hold root
        raise PermissionError(errno.EACCES, "Permission denied", str(self))

    path = tmp_path / "mine.toml"
    path.write_text("seed = 1")
    monkeypatch.setattr(Path, "read_bytes", deny)
    for read in (lambda: read_config_file(path), lambda: load_recipe(str(path))):
        with pytest.raises(MachineError, match=r"mine\.toml cannot be read: permission is denied"):
            read()


def test_a_recipe_that_no_file_can_be_is_refused() -> None:
    refused(load_recipe, "a" * 5000)


def _with(field: str, value: object) -> str:
    content = tiny("ldm-imagenet")
    params = content["model"]["params"]
    places = {"unet": params["unet_config"]["params"], "stage": params["first_stage_config"]["params"]["ddconfig"]}
    place, _, name = field.partition(".")
    (places[place] if name else params)[name or place] = value
    return yaml.safe_dump(content)


YAML = {
    "an impossible date": "model: 2024-13-45",
    "5,000 digits": "model: " + "9" * 5000,
    "nested lists": "[" * 3000 + "]" * 3000,
    "nested maps": "{a: " * 3000 + "}" * 3000,
    "aliases": "a: &a [1, 1]\nb: &b [*a, *a]\nmodel: [*b, *b]",
    "python": "model: !!python/object/apply:os.system [ls]",
    "a megabyte": "model: " + "a" * 2**20,
    "a list for a map": "[1, 2]",
    "an unhashable key": "{[1]: 2}",
    "hundreds of levels": _with("unet.channel_mult", [1] * 500),
    "a multiple without end": _with("unet.channel_mult", [1, 10**15]),
    "a negative width": _with("unet.model_channels", -32),
    "a width of zero": _with("unet.model_channels", 0),
    "a width that no norm divides": _with("unet.model_channels", 33),
    "a width as text": _with("unet.model_channels", "wide"),
    "an endless width": _with("unet.model_channels", float("inf")),
    "a hundred thousand layers": _with("unet.num_res_blocks", 10**5),
    "a depth of a hundred thousand": _with("unet.transformer_depth", 10**5),
    "an image of a million": _with("unet.image_size", 10**6),
    "no heads": _with("unet.num_heads", 0),
    "a resolution of zero": _with("stage.resolution", 0),
    "levels of the stage": _with("stage.ch_mult", [2] * 400),
    "timesteps": _with("timesteps", 10**9),
    "betas": _with("linear_end", float("nan")),
}


@pytest.mark.parametrize("kind", sorted(YAML))
def test_the_configuration_of_a_checkpoint_that_hurts_is_refused_at_once(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(YAML[kind])

    def read_and_build() -> None:
        architecture = read_config(path).architecture
        for name in ("transformer", "vae"):
            empty_module(architecture, name)

    refused(read_and_build)
