"""What DDPM, DDIM and the consistency scheduler share: timesteps that are announced and then visited, and the noise
schedule as diffusers' pipelines and training scripts ask for it."""

import torch

from .noise_schedule import add_noise, choose_timesteps, link_timesteps, look_up_previous, velocity


class AnnouncedTimesteps:
    """For a scheduler with `alphas_cumprod`, whose `_previous` is None until timesteps are announced."""

    _previous: dict[int, int] | None = None

    def __len__(self) -> int:
        return self.config.num_train_timesteps

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: str | torch.device | None = None,
        timesteps: list[int] | None = None,
    ) -> None:
        """Announces the timesteps to sample at: `num_inference_steps` evenly spaced ones, or the given ones."""
        self._announce(choose_timesteps(num_inference_steps, timesteps, len(self.alphas_cumprod), self.config), device)

    def _announce(self, chosen: list[int], device: str | torch.device | None) -> None:
        self.num_inference_steps = len(chosen)
        self.timesteps = torch.tensor(chosen, device=device)
        self._previous = link_timesteps(chosen)

    def previous_timestep(self, timestep: torch.Tensor | int) -> torch.Tensor | int:
        """The timestep that a step from `timestep` arrives at, -1 standing for x_0: a tensor for a tensor, else an int.

        From one that was not announced it is the largest announced below it. Raises ValueError if `timestep` lies
        outside 0 … T - 1, or before `set_timesteps` where it has to come first.
        """
        if self._previous is None:
            raise ValueError("num_inference_steps is None: call set_timesteps before step")
        prev_t = look_up_previous(self._previous, timestep, len(self.alphas_cumprod))
        return torch.tensor(prev_t) if isinstance(timestep, torch.Tensor) else prev_t

    def scale_model_input(self, sample: torch.Tensor, timestep: torch.Tensor | int | None = None) -> torch.Tensor:
        """`sample` itself: the network was trained on x_t as it is."""
        return sample

    def add_noise(self, original_samples: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
        """x_t from x_0 and noise (B, …) at timesteps (B,); see `noise_schedule.add_noise`."""
        return add_noise(self.alphas_cumprod, original_samples, noise, timesteps)

    def get_velocity(self, sample: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
        """The v-prediction target for x_0 = `sample` (B, …) at timesteps (B,); see `noise_schedule.velocity`."""
        return velocity(self.alphas_cumprod, sample, noise, timesteps)
