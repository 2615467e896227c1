"""A memory that is full, in one line that says which settings need less of it."""

from collections.abc import Iterator
from contextlib import contextmanager

from ..config.train import TrainConfig
from ..utils.errors import RunStopped, is_out_of_memory, reason


@contextmanager
def saying_what_needs_less(config: TrainConfig) -> Iterator[None]:
    """A full memory in the block, the processor's or a GPU's, as a RunStopped."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        ways = ", or ".join(_ways(config))
        raise RunStopped(f"out of memory ({reason(error)}); less of it needs {ways}") from error


def _ways(config: TrainConfig) -> Iterator[str]:
    batch, accumulation = config.train_batch_size, config.gradient_accumulation_steps
    if batch > 1:
        yield f"--train_batch_size {-(-batch // 2)} --gradient_accumulation_steps {2 * accumulation}"
    if not config.gradient_checkpointing:
        yield "--gradient_checkpointing"
    yield "a smaller --resolution or a smaller model"
