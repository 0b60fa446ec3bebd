"""Which of several processes holds what of a module in training: FSDP2 and DeepSpeed's ZeRO as Lightning strategies.

Owns: bringing weights and optimiser states together again, whatever the engine. Does not know: drafters, losses, data, how one engine
divides (fully_shard.py, zero.py), how checkpoints look (whole_tensors.py).

Both engines treat the module as one unit: its weights are whole during a training step and its backward pass, and divided between steps.
A drafter is a layer or two and a head that its loss reads whole, so finer units would spare nothing. It also keeps the collectives of all
processes in one order, whatever their batches make the module do.
"""

from __future__ import annotations

from pytorch_lightning.strategies import (
    DDPStrategy,
    DeepSpeedStrategy,
    FSDPStrategy,
    ModelParallelStrategy,
    SingleDeviceStrategy,
    Strategy,
)
from torch import Tensor

from draftsmith.train.run.fully_shard import FullyShard
from draftsmith.train.run.whole_tensors import Sharded
from draftsmith.train.run.zero import Zero

__all__ = ["FullyShard", "Zero", "divides_weights", "refuse_dividing", "refuse_other_engines", "whole"]


def whole(strategy: Strategy, weight: Tensor, state: str | None = None) -> Tensor | None:
    """A weight, or one of the states that its optimiser keeps for it, in full on every process.

    Collective: every process calls it, for the same weights in the same order. The result may share memory with what is trained: copy it,
    do
    not change it.

    Args:
        strategy: of the run.
        weight: as the module has it.
        state: the name of an optimiser state; None for the weight itself.

    Returns:
        the tensor, or None where there is no such state (yet).
    """
    if isinstance(strategy, Sharded):
        return strategy.whole(weight, state)
    if state is None:
        return weight.detach()
    for optimizer in strategy.optimizers:
        if weight in optimizer.state:
            return optimizer.state[weight].get(state)
    return None


def divides_weights(strategy: Strategy) -> bool:
    """Whether a weight is not whole between steps.

    Args:
        strategy: of the run.
    """
    return isinstance(strategy, Sharded) and strategy.divides_weights


def refuse_other_engines(strategy: Strategy) -> None:
    """Checks that weights and checkpoints can be read as one file.

    Args:
        strategy: of the run.

    Raises:
        ValueError: one of Lightning's own sharding strategies.
    """
    if isinstance(strategy, Sharded):
        return
    if isinstance(strategy, DeepSpeedStrategy | FSDPStrategy | ModelParallelStrategy):
        ours = "zero2" if isinstance(strategy, DeepSpeedStrategy) else "fsdp2"
        raise ValueError(
            f"trainer.strategy is {type(strategy).__name__}, which leaves weights and checkpoints in shares; take the engine of "
            f"configs/engines/{ours}.yaml"
        )


def refuse_dividing(strategy: Strategy, what: str, reason: str) -> None:
    """Checks that every process holds the whole module.

    Args:
        strategy: of the run.
        what: what is trained, as in "the judge".
        reason: why it is whole, as in "it must be whole to sample".

    Raises:
        ValueError: a strategy that may keep a part of the module on each process.
    """
    if not isinstance(strategy, SingleDeviceStrategy | DDPStrategy) or isinstance(strategy, DeepSpeedStrategy):
        raise ValueError(
            f"trainer.strategy is {type(strategy).__name__}, which may keep {what} in pieces, and {reason}; use one device or ddp "
            "(configs/engines/ddp.yaml)"
        )
