"""The rows of the table of denoisers: builders of tiny pipelines, with the arguments that keep them small."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from tests.denoisers import flux, further, recent, recent_videos, transformers, unets, videos

_SQUARE = {"height": 64, "width": 64}
_SMALL = {"height": 32, "width": 32}
_CLIP = {"height": 16, "width": 16, "num_frames": 9}


@dataclass(frozen=True)
class Row:
    """One kind of denoiser.

    Attributes:
        build: Makes the pipeline.
        title: What people call it.
        call: Arguments of the pipeline's call that keep the example small.
        num_steps: Sampler steps.
        guidance: Guidance scale; `None` takes the pipeline's own.
        images: Whether images condition it.
        batch_size: How many of the four images are sampled together.
    """

    build: Callable[[], Any]
    title: str
    call: dict[str, Any] = field(default_factory=dict)
    num_steps: int = 3
    guidance: float | None = None
    images: bool = False
    batch_size: int = 4


ROWS = (
    Row(unets.stable_diffusion, "Stable Diffusion 1, 2"),
    Row(unets.turbo, "Stable Diffusion Turbo, one step", num_steps=1, guidance=0.0),
    Row(unets.latent_consistency, "latent consistency (`timestep_cond`)"),
    Row(unets.inpainting, "inpainting UNet, 9 channels", images=True),
    Row(unets.instruct_pix2pix, "InstructPix2Pix, 8 channels", images=True),
    Row(unets.controlnet, "Stable Diffusion with a ControlNet", images=True),
    Row(unets.controlnet_inpaint, "inpainting with a ControlNet", images=True),
    Row(unets.controlnet_xl, "Stable Diffusion XL with a ControlNet", images=True),
    Row(unets.stable_diffusion_xl, "Stable Diffusion XL"),
    Row(unets.xl_refiner, "Stable Diffusion XL refiner", call={"strength": 1.0}, images=True),
    Row(unets.deepfloyd, "DeepFloyd IF, first stage"),
    Row(unets.kandinsky22, "Kandinsky 2.2", call={"height": 16, "width": 16}),
    Row(unets.pixels, "DDPM in pixel space"),
    Row(unets.consistency, "consistency model"),
    Row(transformers.dit, "DiT"),
    Row(transformers.pixart, "PixArt-Sigma", call={"use_resolution_binning": False}),
    Row(transformers.sd3, "Stable Diffusion 3, 3.5"),
    Row(flux.flux_dev, "FLUX.1 dev", call=_SQUARE),
    Row(flux.flux_kontext, "FLUX.1 Kontext", call={**_SQUARE, "max_area": 64 * 64, "_auto_resize": False}, images=True),
    Row(flux.controlnet_flux, "FLUX.1 dev with a ControlNet", call=_SQUARE, images=True),
    Row(flux.flux_fill, "FLUX.1 Fill", call=_SQUARE, images=True),
    Row(flux.flux2_klein, "FLUX.2 Klein, distilled", call=_SQUARE, guidance=1.0),
    Row(flux.flux2_base, "FLUX.2 Klein, base", call=_SQUARE),
    Row(flux.chroma, "Chroma", call=_SQUARE),
    Row(transformers.qwen_image, "Qwen-Image", call={"height": 32, "width": 32}),
    Row(transformers.qwen_image_edit, "Qwen-Image-Edit", call={"height": 128, "width": 128}, images=True),
    Row(transformers.z_image, "Z-Image", call=_SQUARE),
    Row(transformers.auraflow, "AuraFlow", call=_SQUARE),
    Row(transformers.sana, "Sana", call={**_SQUARE, "use_resolution_binning": False}),
    Row(transformers.lumina2, "Lumina 2", call=_SQUARE),
    Row(transformers.cogview4, "CogView 4", call=_SQUARE),
    Row(transformers.hunyuan_dit, "HunyuanDiT", call={**_SQUARE, "use_resolution_binning": False}),
    Row(transformers.hunyuan_image, "HunyuanImage 2.1", call=_SQUARE),
    Row(transformers.hidream, "HiDream-I1", call=_SQUARE),
    Row(transformers.krea2, "Krea 2", call=_SQUARE),
    Row(
        transformers.prx, "PRX", call={**_SQUARE, "use_resolution_binning": False}, batch_size=1
    ),  # guided, it takes one
    Row(transformers.ovis, "Ovis-Image", call=_SQUARE),
    Row(further.cogview3, "CogView 3", call={**_SQUARE, "max_sequence_length": 16}),
    Row(further.lumina, "Lumina-Next", call=_SQUARE),
    Row(further.kandinsky3, "Kandinsky 3", call=_SQUARE),
    Row(further.bria, "Bria 3.2", call=_SQUARE),
    Row(further.longcat, "LongCat-Image", call=_SQUARE),
    Row(further.ernie, "ERNIE-Image", call=_SQUARE, batch_size=2),
    Row(further.omnigen, "OmniGen", call=_SQUARE),
    Row(recent.fibo, "Bria FIBO", call=_SMALL),
    Row(recent.fibo2, "Bria FIBO 2", call=_SQUARE),
    Row(recent.nucleus, "Nucleus-Image, experts", call={**_SMALL, "max_sequence_length": 64}),
    Row(recent.qwen_image21, "Qwen-Image 2.1", call=_SQUARE),
    Row(recent.joy_edit, "JoyImage-Edit", call=_SQUARE, images=True),
    Row(recent.joy_edit_plus, "JoyImage-Edit Plus", call=_SQUARE),
    Row(recent.dreamlite, "DreamLite", call={**_SMALL, "max_sequence_length": 16}, batch_size=1),
    Row(
        further.ideogram4,
        "Ideogram 4, two transformers",
        call={**_SMALL, "max_sequence_length": 256, "guidance_schedule": [7.0] * 3},
    ),
    Row(videos.wan, "Wan 2.1", call=_CLIP),
    Row(videos.wan22, "Wan 2.2, two transformers", call=_CLIP),
    Row(videos.hunyuan_video, "HunyuanVideo", call=_CLIP),
    Row(videos.cogvideox, "CogVideoX", call={**_CLIP, "max_sequence_length": 16}),
    Row(videos.ltx, "LTX-Video", call={"height": 32, "width": 32, "num_frames": 9}),
    Row(videos.stable_video, "Stable Video Diffusion", call={"height": 32, "width": 32, "num_frames": 2}, images=True),
    Row(videos.animatediff, "AnimateDiff", call={"num_frames": 4, "height": 16, "width": 16}),
    Row(videos.text_to_video, "text-to-video UNet (3D)", call={"num_frames": 4, "height": 16, "width": 16}),
    Row(further.latte, "Latte", call={**_SQUARE, "video_length": 2, "clean_caption": False}),
    Row(further.mochi, "Mochi", call={"height": 16, "width": 16, "num_frames": 7, "max_sequence_length": 16}),
    Row(further.sana_video, "Sana-Video", call={**_SMALL, "frames": 9, "use_resolution_binning": False}),
    Row(further.skyreels, "SkyReels V2", call=_CLIP),
    Row(further.wan_vace, "Wan VACE", call=_CLIP, batch_size=1),
    Row(further.anyflow, "AnyFlow", call=_CLIP),
    Row(further.chronoedit, "ChronoEdit", call={**_SMALL, "num_frames": 5}, images=True, batch_size=1),
    Row(further.kandinsky5, "Kandinsky 5", call={**_SMALL, "num_frames": 5}),
    Row(
        further.allegro,
        "Allegro",
        call={"height": 128, "width": 128, "num_frames": 24, "max_sequence_length": 16},
        batch_size=1,
    ),
    Row(recent_videos.hunyuan_video15, "HunyuanVideo 1.5", call=_CLIP, batch_size=1),
    Row(
        recent_videos.framepack,
        "FramePack",
        call={
            **_SMALL,
            "num_frames": 9,
            "latent_window_size": 3,
            "prompt_template": {"template": "{}", "crop_start": 0},
        },
        images=True,
    ),
    Row(recent_videos.ltx2, "LTX-2", call={**_SMALL, "num_frames": 5, "max_sequence_length": 16}),
    Row(recent_videos.easyanimate, "EasyAnimate", call={**_CLIP, "num_frames": 5, "negative_prompt": " "}),
    Row(recent_videos.motif, "Motif-Video", call={**_CLIP, "max_sequence_length": 16}),
    Row(recent_videos.helios, "Helios", call={**_CLIP, "max_sequence_length": 16}),
    Row(recent_videos.anyflow_far, "AnyFlow, causal", call={**_CLIP, "chunk_partition": [1, 1, 1]}),
    Row(recent_videos.kandinsky6, "Kandinsky 6", call={**_CLIP, "num_frames": 5}),
    Row(recent_videos.cosmos3, "Cosmos 3", call={**_CLIP, "num_frames": 5}, batch_size=1),
    Row(further.i2vgen, "I2VGen-XL", call={**_SMALL, "num_frames": 4}, images=True),
)
