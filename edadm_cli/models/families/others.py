"""The families that need only a few fields, such as names and the number of calls per step.

Everything else about them is read from the model.
"""

from __future__ import annotations

from edadm_cli.models.families.family import DenoiserFamily

QWEN_IMAGE = DenoiserFamily(
    name="qwen-image",
    denoisers=("QwenImageTransformer2DModel",),
    masks={"encoder_hidden_states_mask": "encoder_hidden_states"},
    calls_per_step=2,
)
COGVIEW4 = DenoiserFamily(name="cogview 4", denoisers=("CogView4Transformer2DModel",), calls_per_step=2)
WAN = DenoiserFamily(
    name="wan",
    denoisers=(
        "WanTransformer3DModel",
        "WanVACETransformer3DModel",
        "ChronoEditTransformer3DModel",
        "SkyReelsV2Transformer3DModel",
    ),
    block_lists=("blocks",),
    calls_per_step=2,
    shared_arguments=("control_hidden_states_scale",),
    one_prompt_pipelines=("WanVACEPipeline", "ChronoEditPipeline"),
)
KANDINSKY5 = DenoiserFamily(
    name="kandinsky 5",
    denoisers=("Kandinsky5Transformer3DModel", "Kandinsky6Transformer3DModel"),
    block_lists=("visual_transformer_blocks",),
    calls_per_step=2,
    shared_arguments=("visual_rope_pos", "text_rope_pos", "scale_factor"),
)
AURAFLOW = DenoiserFamily(
    name="auraflow",
    denoisers=("AuraFlowTransformer2DModel",),
    blocks={"AuraFlowJointTransformerBlock": "transformer", "AuraFlowSingleTransformerBlock": "transformer"},
    block_lists=("single_transformer_blocks", "joint_transformer_blocks"),
    calls_per_step=1,
)
CASCADE = DenoiserFamily(
    name="stable cascade",
    denoisers=("StableCascadeUNet",),
    blocks={
        "SDCascadeResBlock": "residual",
        "SDCascadeTimestepBlock": "residual",
        "SDCascadeAttnBlock": "attention",
    },
    block_lists=(),
    timestep_arguments=("timestep_ratio",),
    calls_per_step=1,
)
NUCLEUS = DenoiserFamily(
    name="nucleus",
    denoisers=("NucleusMoEImageTransformer2DModel",),
    masks={"encoder_hidden_states_mask": "encoder_hidden_states"},
    calls_per_step=2,
    negative_prompt_pipelines=("NucleusMoEImagePipeline",),
)
HUNYUAN_VIDEO15 = DenoiserFamily(
    name="hunyuan video 1.5",
    denoisers=("HunyuanVideo15Transformer3DModel",),
    one_prompt_pipelines=("HunyuanVideo15Pipeline",),  # its autoencoder decodes one clip at a time
)
DREAMLITE = DenoiserFamily(
    name="dreamlite", denoisers=("DreamLiteUNetModel",), calls_per_step=1, one_prompt_pipelines=("DreamLitePipeline",)
)
EASYANIMATE = DenoiserFamily(
    name="easyanimate",
    denoisers=("EasyAnimateTransformer3DModel",),
    calls_per_step=1,
    negative_prompt_pipelines=("EasyAnimatePipeline", "EasyAnimateControlPipeline", "EasyAnimateInpaintPipeline"),
)
GLM_IMAGE = DenoiserFamily(
    name="glm-image", denoisers=("GlmImageTransformer2DModel",), one_prompt_pipelines=("GlmImagePipeline",)
)
ALLEGRO = DenoiserFamily(
    name="allegro",
    denoisers=("AllegroTransformer3DModel",),
    calls_per_step=1,
    one_prompt_pipelines=("AllegroPipeline",),  # its autoencoder decodes one clip at a time
    tiled_autoencoders=("AutoencoderKLAllegro",),
)
FAMILIES = (
    QWEN_IMAGE,
    COGVIEW4,
    WAN,
    KANDINSKY5,
    AURAFLOW,
    CASCADE,
    NUCLEUS,
    HUNYUAN_VIDEO15,
    DREAMLITE,
    EASYANIMATE,
    GLM_IMAGE,
    ALLEGRO,
)
