"""The family of Stable Diffusion 3 and 3.5: transformers with joint attention over image and text.

References:
    Scaling Rectified Flow Transformers, arXiv 2403.03206.
"""

from __future__ import annotations

from torch import nn

from edadm_cli.models.families.family import Call, DenoiserFamily
from edadm_cli.models.families.values import ExampleValues

_T5_TOKENS = 256


def _example(denoiser: nn.Module, values: ExampleValues) -> Call:
    return (), {
        "hidden_states": values.latents(),
        "timestep": values.timestep(float(values.TIMESTEP)),
        "encoder_hidden_states": values.normal(values.CLIP_TOKENS + _T5_TOKENS, values.config.joint_attention_dim),
        "pooled_projections": values.normal(values.config.pooled_projection_dim),
        "joint_attention_kwargs": None,
    }


SD3 = DenoiserFamily(
    name="sd3",
    denoisers=("SD3Transformer2DModel",),
    blocks={"JointTransformerBlock": "transformer"},
    calls_per_step=1,
    example_call=_example,
)
FAMILIES = (SD3,)
