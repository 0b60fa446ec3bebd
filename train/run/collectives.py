"""What the processes of a run send each other in addition to gradients."""

from collections.abc import Callable

import pytorch_lightning as pl
import torch
from torch import Tensor


def world_size(module: pl.LightningModule) -> int:
    """Processes that train the module together; 1 outside of a trainer.

    Args:
        module: in training.
    """
    return 1 if module._trainer is None else module.trainer.world_size


def sum_over_ranks(module: pl.LightningModule, values: Tensor) -> Tensor:
    """The sum over all processes, on each of them. Collective.

    Args:
        module: in training.
        values: of any shape and dtype.
    """
    return start_sum(module, values)()


def start_sum(module: pl.LightningModule, values: Tensor) -> Callable[[], Tensor]:
    """Like sum_over_ranks, but returns at once.

    Args:
        module: in training.
        values: of any shape and dtype.

    Returns:
        a function that waits for the sum.
    """
    if world_size(module) == 1:
        return lambda: values
    summed = values.clone()
    work = torch.distributed.all_reduce(summed, async_op=True)

    def wait() -> Tensor:
        assert work is not None
        work.wait()
        return summed

    return wait
