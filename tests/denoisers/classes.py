"""Every denoiser class of diffusers, with what becomes of it where no row of the table measures it.

A class of the installed diffusers that is neither measured by a row nor named here has no line in docs/models.md, and a
test fails.
"""

from __future__ import annotations

import inspect

import diffusers
from diffusers.models import transformers, unets

NO_IMAGES = "not a denoiser of images or video"
NO_PIPELINE = "refused: diffusers has no pipeline that samples with it, only modular blocks"

VERDICTS = {
    "AceStepTransformer1DModel": f"{NO_IMAGES}: music",
    "ConsisIDTransformer3DModel": "refused: `ConsisIDPipeline` needs embeddings of a face for every sample",
    "CosmosTransformer3DModel": "refused: its pipelines need a safety checker of the package `cosmos_guardrail`",
    "DreamLiteTransformer2DModel": f"{NO_IMAGES}: a layer of `DreamLiteUNetModel`",
    "Flux3Transformer2DModel": NO_PIPELINE,
    "GlmImageTransformer2DModel": "refused: its pipeline passes it an object, `GlmImageKVCache`, that cannot be stored",
    "Kandinsky6SRTransformer3DModel": "refused: `Kandinsky6SRPipeline` needs a video for every sample",
    "LongCatAudioDiTTransformer": f"{NO_IMAGES}: audio",
    "MiniMaxH3Transformer3DModel": NO_PIPELINE,
    "MiniMaxMusic3RVQDepthDecoder": f"{NO_IMAGES}: music",
    "MiniMaxMusic3Transformer1DModel": f"{NO_IMAGES}: music",
    "MotionAdapter": f"{NO_IMAGES}: weights that `UNetMotionModel` takes over",
    "PriorTransformer": f"{NO_IMAGES}: embeddings of images; it stays at full precision beside a denoiser",
    "RFD4ProteinaTransformer": f"{NO_IMAGES}: proteins",
    "SanaWMLTX2RefinerTransformer3DModel": NO_PIPELINE,
    "SanaWMTransformer3DModel": "refused: `SanaWMPipeline` needs a camera path (`c2w` or `action`) for every sample",
    "StableAudio3DiTModel": f"{NO_IMAGES}: audio",
    "StableAudioDiTModel": f"{NO_IMAGES}: audio",
    "StableCascadeUNet": "refused: its pipelines have a `prior` or `decoder`; a `unet` or `transformer` is expected",
    "T5FilmDecoder": f"{NO_IMAGES}: audio",
    "Transformer2DModel": f"{NO_IMAGES}: a layer of UNets",
    "TransformerTemporalModel": f"{NO_IMAGES}: a layer of video UNets",
    "UNet1DModel": f"{NO_IMAGES}: audio and trajectories",
    "UVit2DModel": "refused: it predicts tokens of a codebook, not the noise of a continuous sample",
    "WanAnimate2Transformer3DModel": NO_PIPELINE,
    "WanAnimateTransformer3DModel": "refused: `WanAnimatePipeline` needs videos of a pose and a face for every sample",
}


def denoiser_classes() -> set[str]:
    """Returns the names of the classes that diffusers lists among its transformers and UNets."""
    classes = (value for module in (transformers, unets) for _, value in inspect.getmembers(module, inspect.isclass))
    return {cls.__name__ for cls in classes if issubclass(cls, diffusers.ModelMixin)}


def markdown(measured: set[str]) -> str:
    """Returns a table with one line for each class that no row measures.

    Args:
        measured: The classes that rows measure.
    """
    lines = ["| denoiser | result |", "|---|---|"]
    lines += [f"| `{name}` | {verdict} |" for name, verdict in sorted(VERDICTS.items()) if name not in measured]
    return "\n".join(lines) + "\n"
