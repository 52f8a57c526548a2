"""The engine's blocks on the Triton kernels themselves, interpreted: the first run on a GPU is no first run."""

from __future__ import annotations

import os
import subprocess
import sys

SCRIPT = """
import torch
from diffusers import UNet2DConditionModel
from edadm_cli.calibrate.nearest import quantize_to_nearest
from edadm_cli.config import BitWidth
from edadm_cli.engines.base import EngineOptions
from edadm_cli.engines.parity import relative_l2
from edadm_cli.engines.reference import ReferenceEngine
from edadm_cli.engines.cuda import CudaEngine
from edadm_cli.models.random_models import example_call
from edadm_cli.recipe import RangeRecipe, Recipe
from edadm_kernels import uses_kernel

assert uses_kernel(torch.zeros(1))
torch.manual_seed(0)
denoiser = UNet2DConditionModel(
    sample_size=8, block_out_channels=(8, 16), layers_per_block=1, cross_attention_dim=16, attention_head_dim=2,
    norm_num_groups=4, down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"), mid_block_type=None,
    up_block_types=("UpBlock2D", "UpBlock2D"),
)
denoiser.eval().requires_grad_(False)
call = example_call(denoiser, batch_size=1, size=(4, 4))
call[1]["encoder_hidden_states"] = call[1]["encoder_hidden_states"][:, :5]
recipe = Recipe(name="test", ranges=RangeRecipe(weight="minmax", activation="minmax"))
quantize_to_nearest(denoiser, recipe, BitWidth.parse("w4a8"), [call])
options = EngineOptions(device=torch.device("cpu"))
exact = ReferenceEngine().compile(denoiser, *call, options)(*call[0], **call[1])[0]
actual = CudaEngine().compile(denoiser, *call, options)(*call[0], **call[1])[0]
# the normalizations sum in another order, which can change the code of a value between two codes
assert relative_l2(actual, exact) < 1e-2, relative_l2(actual, exact)
"""


def test_the_interpreted_kernels_give_what_exact_integers_give() -> None:
    """One block with attention, one without, a sampler each way, and shortcuts of joined channels.

    Triton has to be imported with the variable set, which a fork of a program that has imported torch cannot do.
    """
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    environment.pop("EDADM_KERNELS_BACKEND", None)
    command = [sys.executable, "-c", SCRIPT]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr
