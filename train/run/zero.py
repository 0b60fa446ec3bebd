"""DeepSpeed's ZeRO, stages 2 and 3, as a Lightning strategy.

Owns: DeepSpeed's settings, and the way from its flat shares to whole tensors and back. Does not know: drafters, files.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from typing import Any, Literal

import pytorch_lightning as pl
import torch
from pytorch_lightning.accelerators import CUDAAccelerator
from pytorch_lightning.strategies import DeepSpeedStrategy
from pytorch_lightning.utilities.types import STEP_OUTPUT
from torch import Tensor, nn
from torch.optim import Optimizer

from draftsmith.extras import install_command
from draftsmith.models.target.extension_locks import check_extension_locks
from draftsmith.train.run.checkpoints import AtomicCheckpointIO
from draftsmith.train.run.whole_tensors import Sharded


class Zero(Sharded, DeepSpeedStrategy):
    """DeepSpeed's ZeRO. Stage 2 divides gradients and optimiser states, stage 3 the weights too.

    Precision bf16-mixed is autocast over float32 weights, as with the other engines, not DeepSpeed's cast of the weights.

    Args:
        stage: 2 or 3.
        bucket_size: how many numbers to reduce or gather at a time.
        overlap_comm: reduce gradients during the backward pass.
        process_group_backend: null chooses by the device.

    Raises:
        ValueError: DeepSpeed is not installed, or a setting is out of range; at the start of a run, no CUDA devices, a module that must
            stay whole, or a precision other than 32-true and bf16-mixed.
    """

    def __init__(
        self,
        stage: Literal[2, 3] = 2,
        bucket_size: int = 50_000_000,
        overlap_comm: bool = True,
        process_group_backend: str | None = None,
    ) -> None:
        if importlib.util.find_spec("deepspeed") is None:
            raise ValueError(f"ZeRO needs DeepSpeed, which is not installed; run: {install_command('deepspeed')}")
        if stage not in (2, 3):
            raise ValueError(f"stage is {stage}; it must be 2 or 3")
        if bucket_size < 1:
            raise ValueError(f"bucket_size is {bucket_size}; it must be at least 1")
        zero = {
            "stage": stage,
            "contiguous_gradients": True,
            "reduce_scatter": True,
            "overlap_comm": overlap_comm,
            "reduce_bucket_size": bucket_size,
            "allgather_bucket_size": bucket_size,
            # The whole module is gathered at once (see init_deepspeed): nothing is left to fetch ahead.
            "stage3_prefetch_bucket_size": 0,
        }
        config = {
            "zero_optimization": zero,
            "zero_allow_untested_optimizer": True,
            "bf16": {"enabled": False},  # whatever the precision: it would round the weights themselves
            "train_micro_batch_size_per_gpu": 1,  # for DeepSpeed's own log only; ours are batches of tokens
        }
        super().__init__(config=config, process_group_backend=process_group_backend)
        self.checkpoint_io = AtomicCheckpointIO()
        self.divides_weights = stage == 3
        self._groups: list[list[nn.Parameter]] = []

    def setup_environment(self) -> None:
        """Checks the accelerator, the module and the precision; then what Lightning does.

        Raises:
            ValueError: an accelerator that Lightning's DeepSpeed does not serve, or as `refuse` and `check_extension_locks`.
        """
        if not isinstance(self.accelerator, CUDAAccelerator):
            raise ValueError(
                f"ZeRO trains on CUDA devices, this run's accelerator is {type(self.accelerator).__name__}; set trainer.accelerator "
                "to gpu, or take configs/engines/fsdp2.yaml"
            )
        self.refuse()
        check_extension_locks()
        super().setup_environment()

    def setup(self, trainer: pl.Trainer) -> None:
        """Chooses the precision; then what Lightning does."""
        assert isinstance(self.config, dict)
        if self.precision_plugin.precision == "bf16-mixed":
            # No "safe" modules: those would have their weights and gradients sent in bf16.
            self.config["torch_autocast"] = {"enabled": True, "dtype": "bfloat16", "lower_precision_safe_modules": []}
        super().setup(trainer)

    def init_deepspeed(self) -> None:
        """Makes DeepSpeed's engine; at stage 3 each step first gathers every weight of the module."""
        super().init_deepspeed()
        if not self.divides_weights:
            return
        import deepspeed

        assert self.lightning_module is not None
        for weight in self.lightning_module.parameters():
            deepspeed.zero.register_external_parameter(self.lightning_module, weight)

    def validation_step(self, *args: Any, **kwargs: Any) -> STEP_OUTPUT:
        """The module's own, in the run's precision: what is validated is whole, so DeepSpeed's engine must not gather the weights again."""
        assert self.lightning_module is not None
        in_bf16 = self.precision_plugin.precision == "bf16-mixed"
        with torch.autocast(self.root_device.type, torch.bfloat16, enabled=in_bf16):
            return self.lightning_module.validation_step(*args, **kwargs)

    def _init_optimizers(self) -> Any:
        optimizer, scheduler = super()._init_optimizers()
        # DeepSpeed puts flat shares in their place.
        self._groups = [list(group["params"]) for group in optimizer.param_groups]
        return optimizer, scheduler

    def whole(self, weight: Tensor, state: str | None = None) -> Tensor | None:
        """See `strategies.whole`."""
        import deepspeed
        from deepspeed.utils import safe_get_full_optimizer_state

        if state is not None:
            if state not in self._state_names() or not any(
                weight is trained for group in self._groups for trained in group
            ):
                return None
            self._link_states()
            return safe_get_full_optimizer_state(weight, state)
        if not hasattr(weight, "ds_id"):
            return weight.detach()
        with deepspeed.zero.GatheredParameters([weight]):
            return weight.detach().clone()

    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        """Into whole weights, or into divided ones where this strategy has run before."""
        import deepspeed

        assert self.lightning_module is not None
        with deepspeed.zero.GatheredParameters(list(self.lightning_module.parameters()), modifier_rank=0):
            self.lightning_module.load_state_dict(checkpoint["state_dict"], strict=strict)

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        """Collective. The states as one process has them; without tensors but for the first process."""
        names, number, state, groups = self._state_names(), 0, {}, []
        step = next((values["step"].cpu() for values in self._inner().state.values()), None)
        for group, weights in zip(self._inner().param_groups, self._groups, strict=True):
            numbers = list(range(number, number + len(weights)))
            groups.append({name: value for name, value in group.items() if name != "params"} | {"params": numbers})
            for weight in weights:
                values = {name: self.whole(weight, name) for name in names}
                if step is not None and self.is_global_zero:
                    state[number] = {name: value.cpu() for name, value in values.items() if value is not None}
                    state[number]["step"] = step.clone()  # each its own: optimisers count in place
                number += 1
        return {"state": state, "param_groups": groups}

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        """Divides whole states as DeepSpeed divides the weights."""
        saved = checkpoint["optimizer_states"][0]
        for group, values in zip(self._inner().param_groups, saved["param_groups"], strict=True):
            # Which kernel updates the weights is this engine's business, and another engine may have written the file.
            group.update({name: value for name, value in values.items() if name not in ("params", "fused", "foreach")})
        if not saved["state"]:
            return
        weights = [weight for group in self._groups for weight in group]
        first = next(iter(saved["state"].values()))
        names = [name for name in first if name != "step"]
        for flat in self._flat_shares():
            self._inner().state[flat] = {name: torch.zeros_like(flat) for name in names} | {
                "step": first["step"].clone()
            }
        self._link_states()
        for number, values in saved["state"].items():
            for name in names:
                self._set_state(weights[number], name, values[name])

    def _set_state(self, weight: nn.Parameter, name: str, value: Tensor) -> None:
        from deepspeed.utils import (
            safe_get_local_optimizer_state,
            safe_set_full_optimizer_state,
            safe_set_local_optimizer_state,
        )

        value = value.to(self.root_device)
        if not self.divides_weights:
            safe_set_full_optimizer_state(weight, value, name)
            return
        size = safe_get_local_optimizer_state(weight, name).numel()
        padded = value.new_zeros(size * self.world_size)
        padded[: value.numel()] = value.flatten()
        safe_set_local_optimizer_state(weight, padded[size * self.global_rank :][:size], name)

    def _link_states(self) -> None:
        """Stage 2 notes where each weight's states lie after the first group's step, when those of other groups are not there yet."""
        if not self.divides_weights:
            outer: Any = self.optimizers[0]
            outer._hp_optimizer_states_linked = False
            outer._lazy_init_hp_params_optimizer_state()

    def _inner(self) -> Optimizer:
        """The optimiser that the module made; DeepSpeed's own stands around it."""
        return self.optimizers[0].optimizer  # type: ignore[attr-defined]

    def _flat_shares(self) -> list[Tensor]:
        name = "fp32_partitioned_groups_flat" if self.divides_weights else "single_partition_of_fp32_groups"
        return list(getattr(self.optimizers[0], name))

    def _state_names(self) -> list[str]:
        states = list(self._inner().state.values()) if self.optimizers else []
        return [name for name in states[0] if name != "step"] if states else []
