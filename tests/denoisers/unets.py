"""Builders of tiny pipelines that make images with a UNet: one function per row of the table."""

from __future__ import annotations

from typing import Any

import diffusers as d
import torch

from tests.denoisers import parts

_HEADS = {"num_attention_heads": 2, "attention_head_dim": 16}


def _stable_diffusion(name: str, *, scheduler: Any = None, **fields: Any) -> Any:
    text, vae, unet = parts.clip(), parts.kl(levels=2), parts.unet(**fields)
    return parts.assembled(name, unet, text, vae=vae, scheduler=scheduler or parts.ddim(), **parts.NO_CHECKER)


def stable_diffusion() -> Any:
    return _stable_diffusion("StableDiffusionPipeline")


def inpainting() -> Any:
    return _stable_diffusion("StableDiffusionInpaintPipeline", in_channels=9)


def instruct_pix2pix() -> Any:
    return _stable_diffusion("StableDiffusionInstructPix2PixPipeline", in_channels=8)


def latent_consistency() -> Any:
    return _stable_diffusion("LatentConsistencyModelPipeline", scheduler=d.LCMScheduler(), time_cond_proj_dim=8)


def turbo() -> Any:
    scheduler = d.EulerAncestralDiscreteScheduler(timestep_spacing="trailing")
    return _stable_diffusion("StableDiffusionPipeline", scheduler=scheduler)


def _xl(name: str, *texts: parts.Pair, unet: Any, **components: Any) -> Any:
    scheduler = d.EulerDiscreteScheduler()
    return parts.assembled(name, unet, *texts, scheduler=scheduler, add_watermarker=False, **components)


def stable_diffusion_xl() -> Any:
    texts = parts.clip(), parts.clip(projection=True)
    return _xl("StableDiffusionXLPipeline", *texts, vae=parts.kl(levels=2), unet=parts.xl_unet())


def xl_refiner() -> Any:
    text, vae = parts.clip(projection=True), parts.kl(levels=2)
    unet = parts.xl_unet(cross_attention_dim=16, projection_class_embeddings_input_dim=5 * 8 + 16)
    texts = (None, None), text
    return _xl("StableDiffusionXLImg2ImgPipeline", *texts, vae=vae, unet=unet, requires_aesthetics_score=True)


def deepfloyd() -> Any:
    tokenizer, encoder = parts.t5()
    unet = d.UNet2DConditionModel(
        sample_size=16,
        layers_per_block=1,
        block_out_channels=(16, 32),
        down_block_types=("ResnetDownsampleBlock2D", "SimpleCrossAttnDownBlock2D"),
        mid_block_type="UNetMidBlock2DSimpleCrossAttn",
        up_block_types=("SimpleCrossAttnUpBlock2D", "ResnetUpsampleBlock2D"),
        in_channels=3,
        out_channels=6,
        cross_attention_dim=32,
        encoder_hid_dim=32,
        attention_head_dim=8,
        addition_embed_type="text",
        addition_embed_type_num_heads=2,
        cross_attention_norm="group_norm",
        resnet_time_scale_shift="scale_shift",
        act_fn="gelu",
        norm_num_groups=4,
    )
    scheduler = d.DDPMScheduler(
        beta_schedule="squaredcos_cap_v2",
        thresholding=True,
        dynamic_thresholding_ratio=0.95,
        sample_max_value=1.0,
        variance_type="learned_range",
    )
    return d.IFPipeline(
        tokenizer=tokenizer, text_encoder=encoder, unet=unet, scheduler=scheduler, watermarker=None, **parts.NO_CHECKER
    )


def movq() -> Any:
    """The autoencoder of Kandinsky, with 4 latent channels."""
    return d.VQModel(
        block_out_channels=(32, 64),
        down_block_types=("DownEncoderBlock2D", "AttnDownEncoderBlock2D"),
        up_block_types=("AttnUpDecoderBlock2D", "UpDecoderBlock2D"),
        in_channels=3,
        out_channels=3,
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=8,
        norm_type="spatial",
        num_vq_embeddings=12,
        vq_embed_dim=4,
    )


def kandinsky22() -> Any:
    tokenizer, encoder = parts.clip(projection=True, width=32)
    unet = d.UNet2DConditionModel(
        sample_size=8,
        in_channels=4,
        out_channels=8,
        addition_embed_type="image",
        encoder_hid_dim=32,
        encoder_hid_dim_type="image_proj",
        cross_attention_dim=16,
        attention_head_dim=8,
        block_out_channels=(16, 32),
        layers_per_block=1,
        norm_num_groups=4,
        down_block_types=("ResnetDownsampleBlock2D", "SimpleCrossAttnDownBlock2D"),
        up_block_types=("SimpleCrossAttnUpBlock2D", "ResnetUpsampleBlock2D"),
        mid_block_type="UNetMidBlock2DSimpleCrossAttn",
        resnet_time_scale_shift="scale_shift",
    )
    prior = d.PriorTransformer(
        num_attention_heads=2, attention_head_dim=16, embedding_dim=32, num_layers=1, num_embeddings=8
    )
    return d.KandinskyV22CombinedPipeline(
        unet=unet,
        scheduler=d.DDPMScheduler(beta_schedule="linear", beta_start=0.00085, beta_end=0.012),
        movq=movq(),
        prior_prior=prior,
        prior_image_encoder=parts.vision(32),
        prior_text_encoder=encoder,
        prior_tokenizer=tokenizer,
        prior_scheduler=d.UnCLIPScheduler(
            variance_type="fixed_small_log", prediction_type="sample", num_train_timesteps=1000
        ),
        prior_image_processor=parts.image_processor(),
    )


def pixels() -> Any:
    return d.DDPMPipeline(unet=parts.pixel_unet(), scheduler=d.DDIMScheduler())


def consistency() -> Any:
    unet = parts.pixel_unet(
        resnet_time_scale_shift="scale_shift",
        down_block_types=("ResnetDownsampleBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "ResnetUpsampleBlock2D"),
    )
    return d.ConsistencyModelPipeline(unet=unet, scheduler=d.CMStochasticIterativeScheduler(num_train_timesteps=40))


def awake(control: Any) -> Any:
    """Gives the last layers of a control network weights: they begin at zero, where the control changes nothing."""
    for name, layer in control.named_modules():
        if "controlnet_" in name and hasattr(layer, "weight"):
            torch.nn.init.normal_(layer.weight, std=0.1)
    return control


def controlnet() -> Any:
    text = parts.clip()
    unet = parts.unet()
    return parts.assembled(
        "StableDiffusionControlNetPipeline",
        unet,
        text,
        vae=parts.kl(levels=2),
        controlnet=awake(d.ControlNetModel.from_unet(unet, conditioning_embedding_out_channels=(8, 16))),
        scheduler=parts.ddim(),
        **parts.NO_CHECKER,
    )


def controlnet_inpaint() -> Any:
    return d.StableDiffusionControlNetInpaintPipeline(**controlnet().components, requires_safety_checker=False)


def controlnet_xl() -> Any:
    pipeline = stable_diffusion_xl()
    control = d.ControlNetModel.from_unet(pipeline.unet, conditioning_embedding_out_channels=(8, 16))
    return d.StableDiffusionXLControlNetPipeline(
        **pipeline.components, controlnet=awake(control), add_watermarker=False
    )
