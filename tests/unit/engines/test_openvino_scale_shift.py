"""Residual blocks that scale and shift: OpenVINO would end the process in float32 without another form."""

from __future__ import annotations

from tests.integration.fresh_interpreter import FreshInterpreter

IN_A_PROCESS_OF_ITS_OWN = """
import torch
from diffusers import UNet2DModel
from edadm_cli.engines.base import EngineOptions
from edadm_cli.engines.openvino import OpenVinoEngine
torch.manual_seed(0)
unet = UNet2DModel(
    sample_size=16, in_channels=3, out_channels=3, block_out_channels=(16,), layers_per_block=1, norm_num_groups=4,
    down_block_types=("DownBlock2D",), up_block_types=("UpBlock2D",), attention_head_dim=8,
    resnet_time_scale_shift="scale_shift",
).eval()
call = (torch.randn(1, 3, 16, 16), torch.tensor(7))
with torch.no_grad():
    actual = OpenVinoEngine().compile(unet, call, {}, EngineOptions(torch.device("cpu"), num_threads=1))(*call).sample
    expected = unet(*call).sample
assert (actual - expected).norm() < 1e-4 * expected.norm(), (actual - expected).norm() / expected.norm()
"""


def test_scale_and_shift_in_float32_run_and_agree(fresh_interpreter: FreshInterpreter) -> None:
    assert fresh_interpreter.run(IN_A_PROCESS_OF_ITS_OWN) == 0, "what it says is on stderr"
