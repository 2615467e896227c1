"""Which objective a run has."""

from ..config.train import TrainConfig
from .consistency import ConsistencyTraining, Distillation, TrajectoryDistillation
from .denoising import Denoising
from .objective import Objective

OBJECTIVES: dict[str | None, type[Objective]] = {
    None: Denoising,
    "distillation": Distillation,
    "trajectories": TrajectoryDistillation,
    "training": ConsistencyTraining,
}


def objective_of(config: TrainConfig) -> Objective:
    """What the settings ask for."""
    return OBJECTIVES[config.consistency](config)
