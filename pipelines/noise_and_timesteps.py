"""What a call starts from and where it goes: noise that belongs to one picture, and the timesteps of any scheduler."""

import inspect
import math

import torch
from diffusers.schedulers import PNDMScheduler
from diffusers.utils.torch_utils import randn_tensor


class NoiseAndTimesteps:
    """For a pipeline that has `scheduler` and `vae_scale_factor`."""

    _num_timesteps = 0

    @property
    def num_timesteps(self) -> int:
        """The number of steps of the current call."""
        return self._num_timesteps

    def _generators(
        self,
        seeds: list[int] | None,
        generator: torch.Generator | list[torch.Generator] | None,
        num_prompts: int,
        num_images_per_prompt: int,
    ) -> tuple[torch.Generator | list[torch.Generator] | None, int]:
        """(what the noise is drawn with, pictures per prompt).

        With `seeds` every picture has a generator of its own, on the CPU, so that its noise is the same in any batch
        and on any device. One prompt is drawn once for each seed.
        """
        if seeds is None:
            return generator, num_images_per_prompt
        if generator is not None:
            raise ValueError("pass seeds or generator, not both")
        if num_prompts == 1 and num_images_per_prompt == 1:
            num_images_per_prompt = len(seeds)
        if not seeds or len(seeds) != num_prompts * num_images_per_prompt:
            raise ValueError(
                f"{len(seeds)} seeds for {num_prompts * num_images_per_prompt} pictures: pass one for each"
            )
        return [torch.Generator("cpu").manual_seed(seed) for seed in seeds], num_images_per_prompt

    def prepare_latents(
        self,
        batch_size: int,
        num_channels_latents: int,
        height: int,
        width: int,
        dtype: torch.dtype,
        device: torch.device,
        generator: torch.Generator | list[torch.Generator] | None,
        latents: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Return the first latents (B, C, H, W): `latents`, or noise of `generator`, times the scheduler's sigma.

        Raises:
            ValueError: a list of generators that is not one for each picture; latents of another shape.
        """
        shape = (batch_size, num_channels_latents, height // self.vae_scale_factor, width // self.vae_scale_factor)
        return self._noise(shape, generator, dtype, device, latents) * self.scheduler.init_noise_sigma

    def _noise(
        self,
        shape: tuple[int, ...],
        generator: torch.Generator | list[torch.Generator] | None,
        dtype: torch.dtype,
        device: torch.device,
        latents: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """`latents` if they have that shape, or noise of `generator` if there are none."""
        if latents is None:
            return self._normal(shape, generator, dtype, device)
        if tuple(latents.shape) != shape:
            raise ValueError(f"latents have shape {tuple(latents.shape)}, but this call draws {shape}")
        return latents.to(device=device, dtype=dtype)

    @staticmethod
    def _normal(
        shape: tuple[int, ...],
        generator: torch.Generator | list[torch.Generator] | None,
        dtype: torch.dtype,
        device: torch.device,
    ) -> torch.Tensor:
        """Standard normal noise, of a list of generators a picture each."""
        if isinstance(generator, list) and len(generator) != shape[0]:
            raise ValueError(f"{len(generator)} generators for {shape[0]} pictures: pass one, or one for each")
        return randn_tensor(shape, generator=generator, device=device, dtype=dtype)

    def _set_timesteps(
        self,
        num_inference_steps: int,
        device: torch.device,
        timesteps: list[int] | None = None,
        sigmas: list[float] | None = None,
        strength: float = 1.0,
    ) -> torch.Tensor:
        """Set the scheduler's timesteps, by number or as given, and return the last `strength` share of them.

        A scheduler that takes a strength itself, as those of few-step models do, takes all its steps within that share.
        """
        if timesteps is not None and sigmas is not None:
            raise ValueError("pass timesteps or sigmas, not both")
        if not 0 < strength <= 1:
            raise ValueError(
                f"strength={strength}: it must lie above 0 and at most at 1, which starts from noise alone"
            )
        custom = {k: v for k, v in (("timesteps", timesteps), ("sigmas", sigmas)) if v is not None}
        takes = inspect.signature(self.scheduler.set_timesteps).parameters.keys()
        for name in custom.keys() - takes:
            raise ValueError(f"{type(self.scheduler).__name__} takes no {name} of yours: pass num_inference_steps")
        options = custom or {"num_inference_steps": num_inference_steps}
        if not custom and "strength" in takes:
            options["strength"], strength = strength, 1.0
        self.scheduler.set_timesteps(**options, device=device)
        steps = num_inference_steps
        if custom:  # of which samplers of order 2 make two each but the last
            steps = math.ceil(len(self.scheduler.timesteps) / self.scheduler.order)
        # 0.29 * 100 steps is 28.999… in floating point; and never none, which would return the picture as it is.
        skipped = (steps - max(int(round(steps * strength, 6)), 1)) * self.scheduler.order
        if hasattr(self.scheduler, "set_begin_index"):
            self.scheduler.set_begin_index(skipped)
        remaining = self.scheduler.timesteps[skipped:]
        if skipped and isinstance(self.scheduler, PNDMScheduler):
            remaining = self._last_pndm_timesteps(skipped)
        self._num_timesteps = len(remaining)
        return remaining

    def _last_pndm_timesteps(self, skipped: int) -> torch.Tensor:
        """Without the first `skipped` of PNDM's N steps.

        PNDM calls the network twice for its first step, wherever it begins, and so names the second timestep twice.
        Without that its samples would lag a step behind the timesteps.
        """
        if not self.scheduler.config.skip_prk_steps:
            raise ValueError("PNDMScheduler begins in the middle only with skip_prk_steps=True: set it, or strength=1")
        timesteps = self.scheduler.timesteps
        once = torch.cat([timesteps[:1], timesteps[2:]])[skipped:]
        return torch.cat([once[:2], once[1:]])
