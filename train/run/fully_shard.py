"""FSDP2 as a Lightning strategy: weights, gradients and optimiser states divided over all processes.

Owns: dividing a module, its whole tensors and its states, in terms of PyTorch's DTensor. Does not know: drafters, files.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.strategies import ModelParallelStrategy
from torch import Tensor, nn
from torch.optim import Optimizer

from draftsmith.train.run.checkpoints import AtomicCheckpointIO
from draftsmith.train.run.whole_tensors import Sharded


class FullyShard(Sharded, ModelParallelStrategy):
    """FSDP2: weights, gradients and optimiser states are divided over all processes.

    Args:
        process_group_backend: null chooses by the device.

    Raises:
        ValueError: at the start of a run, a module that must stay whole, or a precision other than 32-true and bf16-mixed.
    """

    def __init__(self, process_group_backend: str | None = None) -> None:
        super().__init__(tensor_parallel_size=1, process_group_backend=process_group_backend)
        self.checkpoint_io = AtomicCheckpointIO()

    def setup_environment(self) -> None:
        """All processes are one data-parallel group, on one machine or several."""
        self.refuse()
        self._data_parallel_size = self.num_nodes * self.num_processes
        super().setup_environment()

    def setup(self, trainer: pl.Trainer) -> None:
        """Divides the module; then what Lightning does."""
        assert self.model is not None
        self._divide(self.model)
        super().setup(trainer)

    def _divide(self, module: nn.Module) -> None:
        from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method

        if isinstance(module, FSDPModule):
            return
        module.to(self.root_device)
        for tensor in (*module.parameters(), *module.buffers()):
            torch.distributed.broadcast(tensor.detach(), 0)
        fully_shard(module, mesh=self.device_mesh["data_parallel"], reshard_after_forward=False)
        # The step itself is the forward pass: the loss reads the head outside of any layer's own.
        register_fsdp_forward_method(module, "training_step")

    def whole(self, weight: Tensor, state: str | None = None) -> Tensor | None:
        """See `strategies.whole`."""
        from torch.distributed.tensor import DTensor

        value: Tensor | None = weight.detach()
        if state is not None:
            kept = [optimizer.state[weight] for optimizer in self.optimizers if weight in optimizer.state]
            value = kept[0].get(state) if kept else None
        return value.full_tensor() if isinstance(value, DTensor) else value

    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        """Into whole weights, or into divided ones where this strategy has run before."""
        from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict

        assert self.lightning_module is not None
        options = StateDictOptions(full_state_dict=True, strict=strict)
        set_model_state_dict(self.lightning_module, dict(checkpoint["state_dict"]), options=options)

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        """Collective. The states as one process has them; without tensors but for the first process."""
        states = optimizer.state_dict()
        return {
            "state": {number: self._gathered_state(state) for number, state in states["state"].items()},
            "param_groups": states["param_groups"],
        }

    def _gathered_state(self, state: Mapping[str, Any]) -> dict[str, Any]:
        from torch.distributed.tensor import DTensor

        kept = {}
        for name, value in state.items():
            full = value.full_tensor() if isinstance(value, DTensor) else value
            if self.is_global_zero:
                kept[name] = full.to("cpu", copy=True) if isinstance(full, Tensor) else full
        return kept

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        """Divides whole states as the weights are divided."""
        for optimizer, saved in zip(self.optimizers, checkpoint["optimizer_states"], strict=True):
            weights = [weight for group in optimizer.param_groups for weight in group["params"]]
            state = {number: _divided_like(weights[number], values) for number, values in saved["state"].items()}
            optimizer.load_state_dict({"state": state, "param_groups": saved["param_groups"]})


def _divided_like(weight: Any, values: Mapping[str, Any]) -> dict[str, Any]:
    from torch.distributed.tensor import distribute_tensor

    divided = {}
    for name, value in values.items():
        if isinstance(value, Tensor) and value.shape == weight.shape and value.ndim:
            # Every process has read the whole file, so nothing needs to be sent.
            value = distribute_tensor(
                value.to(weight.device), weight.device_mesh, weight.placements, src_data_rank=None
            )
        divided[name] = value
    return divided
