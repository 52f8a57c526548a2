"""Schedulers of the paper's systems that diffusers does not have."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import DDIMScheduler, SchedulerMixin
from diffusers.schedulers.scheduling_ddim import DDIMSchedulerOutput
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

__all__ = ["QuadraticDDIMScheduler", "SchedulerMixin"]
# SchedulerMixin is among them because diffusers recognises a component by the base classes in its module.

_SHARE = 0.8  # of the training steps that the quadratic sequence spans


class QuadraticDDIMScheduler(DDIMScheduler):
    r"""DDIM on timesteps that are spaced quadratically.

    $$\tau_i = \lfloor i^2\, 0.8\, T / (S - 1)^2 \rfloor, \quad i = 0 \dots S - 1$$

    for T training and S sampling steps. The first few timesteps coincide when S is large; such a step changes nothing.

    References:
        DDIM, arXiv 2010.02502, equations 12 and 16, appendix D.2.
    """

    def set_timesteps(self, num_inference_steps: int, device: str | torch.device | None = None) -> None:
        """Sets the timesteps of one sampling, from noise to data."""
        self.num_inference_steps = num_inference_steps
        end = (_SHARE * self.config.num_train_timesteps) ** 0.5
        ascending = torch.linspace(0, end, num_inference_steps, dtype=torch.float64).square().floor().long()
        self.timesteps = ascending.flip(0).to(device)
        self._next = 0

    def step(
        self,
        model_output: Tensor,
        timestep: int | Tensor,
        sample: Tensor,
        eta: float = 0.0,
        use_clipped_model_output: bool = False,
        generator: Any = None,
        variance_noise: Tensor | None = None,
        return_dict: bool = True,
    ) -> Any:
        """Takes one step; the arguments and the result are those of `DDIMScheduler.step`."""
        timesteps = self.timesteps.tolist()
        if self._next >= len(timesteps) or int(timestep) != timesteps[self._next]:
            raise ValueError(f"The timestep {int(timestep)} is not the next one of this sampling.")
        self._next += 1
        alpha = self.alphas_cumprod[int(timestep)]
        is_last = self._next == len(timesteps)
        alpha_next = self.final_alpha_cumprod if is_last else self.alphas_cumprod[timesteps[self._next]]
        clean, noise = self._predictions(model_output, sample, alpha)
        if use_clipped_model_output:
            noise = (sample - alpha.sqrt() * clean) / (1 - alpha).sqrt()
        sigma = eta * ((1 - alpha_next) / (1 - alpha) * (1 - alpha / alpha_next)).clamp_min(0).sqrt()
        result = alpha_next.sqrt() * clean + (1 - alpha_next - sigma**2).clamp_min(0).sqrt() * noise
        if eta > 0:
            if variance_noise is None:
                variance_noise = randn_tensor(
                    model_output.shape, generator=generator, device=model_output.device, dtype=model_output.dtype
                )
            result = result + sigma * variance_noise
        result = result.to(sample.dtype)
        return DDIMSchedulerOutput(result, clean) if return_dict else (result, clean)

    def _predictions(self, model_output: Tensor, sample: Tensor, alpha: Tensor) -> tuple[Tensor, Tensor]:
        """Returns the clean sample and the noise that the model predicts from a noisy sample."""
        if self.config.prediction_type == "epsilon":
            noise = model_output
            clean = (sample - (1 - alpha).sqrt() * noise) / alpha.sqrt()
        elif self.config.prediction_type == "sample":
            clean = model_output
            noise = (sample - alpha.sqrt() * clean) / (1 - alpha).sqrt()
        else:
            clean = alpha.sqrt() * sample - (1 - alpha).sqrt() * model_output
            noise = alpha.sqrt() * model_output + (1 - alpha).sqrt() * sample
        if self.config.clip_sample:
            clean = clean.clamp(-self.config.clip_sample_range, self.config.clip_sample_range)
        return clean, noise
