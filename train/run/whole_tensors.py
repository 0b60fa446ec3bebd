"""What engines that divide a module among processes have in common: checkpoints of whole tensors.

Owns: the form of the checkpoints, when they are restored, which modules and precisions can be divided. Does not know: drafters, losses,
data, how one engine divides (fully_shard.py, zero.py).

Such a checkpoint is that of one process: one file with whole weights and whole optimiser states, written by the first process. A run saved
under one engine resumes under any other. One rename replaces the file, which would be impossible with a folder of shares.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from typing import Any

from lightning_fabric.utilities.types import _PATH
from pytorch_lightning.strategies import Strategy
from torch import Tensor

PRECISIONS = ("32-true", "bf16-mixed")


class Sharded(Strategy):
    """What both strategies share: checkpoints of whole tensors, restored before anything is divided."""

    divides_weights = True

    @abstractmethod
    def whole(self, weight: Tensor, state: str | None = None) -> Tensor | None:
        """See `strategies.whole`."""

    @property
    def restore_checkpoint_after_setup(self) -> bool:
        """Weights are loaded while they are whole; only the optimiser's states come later."""
        return False

    @property
    def lightning_restore_optimizer(self) -> bool:
        """Lightning calls load_optimizer_state_dict."""
        return True

    def lightning_module_state_dict(self) -> dict[str, Any]:
        """Collective. Every weight and buffer by name, in full and on the CPU; empty but for the first process."""
        assert self.lightning_module is not None
        return self._gathered(self.lightning_module.state_dict(keep_vars=True))

    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: _PATH, storage_options: Any | None = None) -> None:
        """One file, written by the first process."""
        Strategy.save_checkpoint(self, checkpoint, filepath, storage_options)

    def load_checkpoint(self, checkpoint_path: _PATH, weights_only: bool | None = None) -> dict[str, Any]:
        """Every process reads the file."""
        return Strategy.load_checkpoint(self, checkpoint_path, weights_only)

    def _gathered(self, tensors: Mapping[str, Any]) -> dict[str, Any]:
        kept: dict[str, Any] = {}
        for name, value in tensors.items():
            full = self.whole(value) if isinstance(value, Tensor) else value
            if self.is_global_zero:
                kept[name] = full.detach().to("cpu", copy=True) if isinstance(full, Tensor) else full
        return kept

    def refuse(self) -> None:
        """Checks the module and the precision.

        Raises:
            ValueError: a module that must stay whole, or a precision that the engines do not share.
        """
        module = self.lightning_module
        if not getattr(module, "may_be_divided", False):
            raise ValueError(
                f"{type(module).__name__} is trained whole, and {type(self).__name__} would divide it among processes; use "
                "configs/engines/ddp.yaml, or one device"
            )
        chosen = self.precision_plugin.precision
        if chosen not in PRECISIONS:
            raise ValueError(
                f"trainer.precision is {chosen!r}; {type(self).__name__} trains with {' or '.join(PRECISIONS)}: weights stay in float32, "
                "bf16-mixed multiplies in bf16"
            )
