"""What identifies an evaluation is found without a library that computes."""

from __future__ import annotations

import subprocess
import sys

import pytest

SCRIPT = """
import sys
from edadm_cli.config import EvaluateConfig
from edadm_cli.evaluate.spaces import real_images, space_of
from edadm_cli.models.registry import known_models
entry = known_models()[sys.argv[1]]
space = space_of(entry)
real = real_images(entry, space)
assert len(space.digest(EvaluateConfig.model_construct(inception_weights=None))) == 64
assert len(real.digest) == 64 and real.layers == ("pooled", "spatial")
assert space.label_of(sys.argv[2]) is not None
print(*sorted({"torch", "numpy", "PIL"} & set(sys.modules)))
"""


@pytest.mark.parametrize(("model", "prompt"), [("digits-sd", "a seven"), ("emoji-sd", "pear, flat style")])
def test_shipped_networks_and_images_are_identified_without_loading_them(model: str, prompt: str) -> None:
    done = subprocess.run([sys.executable, "-c", SCRIPT, model, prompt], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ""
