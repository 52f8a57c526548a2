"""Writes a tiny pipeline with random weights, or few pictures, in the place of large ones in a trial on a CPU.

python benchmarks/tiny_models.py flux FOLDER
"""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

package = ModuleType("tests")  # other packages install one of this name
package.__path__ = [str(Path(__file__).parents[1] / "tests")]
sys.modules["tests"] = package

import torch  # noqa: E402

from edadm_cli.models.emoji.data import real_pictures  # noqa: E402
from edadm_cli.models.emoji.train.corpus import Pictures  # noqa: E402
from edadm_cli.models.emoji.train.packed import pack  # noqa: E402
from tests.denoisers import flux, unets, videos  # noqa: E402


class FewPictures:
    """Some of the real emoji that ship, as the training of `ddpm-emoji` takes them."""

    def save_pretrained(self, folder: Path) -> None:
        """Writes `pictures.npz`."""
        pixels, order = real_pictures()[:300], torch.arange(300)
        pack(Pictures(pixels, train=order[:290], held_out=order[290:]), b"{}", folder / "pictures.npz")


BUILDERS: dict[str, Callable[[], Any]] = {
    "flux": flux.flux_dev,
    "sdxl": unets.stable_diffusion_xl,
    "cogvideox": partial(videos.cogvideox, text_tokens=226),  # as many as the pipeline encodes
    "svd": videos.stable_video,
    "wan": videos.wan,
    "emoji-pictures": FewPictures,
}


def main() -> None:
    """Writes what the command line names."""
    name, folder = sys.argv[1], Path(sys.argv[2])
    shutil.rmtree(folder, ignore_errors=True)
    torch.manual_seed(0)
    BUILDERS[name]().save_pretrained(folder)


if __name__ == "__main__":
    main()
