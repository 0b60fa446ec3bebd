"""Draft heads trained together with a LoRA of their target, which is kept close to the target itself (Medusa-2, arXiv:2401.10774).

    loss of the adapter = keep_weight KL(target || adapted) + heads_weight (loss of the heads over the adapted states)
    loss of the heads   = their own

The heads' loss reaches the adapter through the states that they read. The target's own states, which the cache holds, are the other side of
the divergence, so the target runs once a step. What comes out is an adapter and heads for the adapted model. That model is another one than
the target: decoding with it is lossless with respect to the adapted model, not to the target.

Owns: how the two losses meet, and what is kept. Does not know: the adapter itself (`adapted_target.py`), the heads' loss (`objective.py`).
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from draftsmith.models.drafters.family import DrafterFamily
from draftsmith.models.files.adapter_files import TARGET_ADAPTER
from draftsmith.models.files.loading import target_fingerprint
from draftsmith.models.target.target import PRE_NORM, Target, TargetEnds
from draftsmith.train.batches.cache_subset import CacheBatch
from draftsmith.train.batches.online import OnlineDataModule
from draftsmith.train.drafter.adapted_target import AdaptedTarget, TargetLora, kept
from draftsmith.train.drafter.module import DraftModule


class JointDraftModule(DraftModule):
    """Trains draft heads and a LoRA of their target together (Medusa-2). The cache holds the target's own `last.pre_norm`.

    Args:
        target: path or hub id of the target that made the cache; it is loaded whole, in float32.
        drafter: settings of heads that read the last state alone.
        target_lora: the adapter, its learning rate and the weights of its losses.
        num_steps: draft steps K.
        horizon_decay: step k weighs horizon_decay ** k; the paper takes 0.8.
        lr: peak learning rate of the heads.
        betas: AdamW's.
        weight_decay: of the heads' matrices.
        warmup_ratio: share of all steps in which the learning rates rise.
        min_lr_ratio: they fall to this share of their peaks.
        chunk_rows: rows of logits in memory at a time; null chooses.
        metrics_every: log training's metrics every so many steps.
        val_steps: draft steps of validation; null takes num_steps.
        revision: the hub's revision of the target.
        trust_remote_code: whether Python files that come with the target may run.

    Raises:
        ValueError: settings out of range; in setup(), what :class:`DraftModule` refuses, more than one process, the target in the loop,
            heads that read other states, or a family that learns through the target.
    """

    def __init__(
        self,
        target: str,
        drafter: DrafterFamily,
        target_lora: TargetLora,
        num_steps: int = 4,
        horizon_decay: float = 0.8,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.98),
        weight_decay: float = 0.0,
        warmup_ratio: float = 0.05,
        min_lr_ratio: float = 0.0,
        chunk_rows: int | None = None,
        metrics_every: int = 10,
        val_steps: int | None = None,
        revision: str | None = None,
        trust_remote_code: bool = False,
    ) -> None:
        ends_dtype: Literal["float32"] = "float32"
        super().__init__(
            target,
            drafter,
            num_steps=num_steps,
            horizon_decay=horizon_decay,
            val_steps=val_steps,
            lr=lr,
            betas=betas,
            weight_decay=weight_decay,
            warmup_ratio=warmup_ratio,
            min_lr_ratio=min_lr_ratio,
            chunk_rows=chunk_rows,
            metrics_every=metrics_every,
            ends_dtype=ends_dtype,
            revision=revision,
            trust_remote_code=trust_remote_code,
        )
        self.target_lora = target_lora
        self.adapted: AdaptedTarget | None = None
        self._kept_sums: list[tuple[float, float]] = []

    def settings(self) -> dict[str, Any]:
        """See :meth:`DraftModule.settings`."""
        return {**super().settings(), "target_lora": vars(self.target_lora)}

    def setup(self, stage: str) -> None:
        """As :meth:`DraftModule.setup`, and loads the whole target with a fresh adapter.

        Raises:
            ValueError: as there; or more than one process, the target in the loop, heads that read other states, or a family that learns
                through the target.
        """
        if self.family.kind.learns_through_target:
            raise ValueError(
                f"JointDraftModule trains heads over the states of a target that learns beside them, and a "
                f"{self.family.kind.__name__} learns through the target's own blocks; use a family of heads here, or "
                "DraftModule for this family"
            )
        if self.trainer.world_size > 1:
            raise ValueError(
                f"JointDraftModule trains in one process, and this run has {self.trainer.world_size}; set trainer.devices to 1"
            )
        if isinstance(getattr(self.trainer, "datamodule", None), OnlineDataModule):
            raise ValueError("JointDraftModule reads the target's own states from a cache; give it CacheDataModule")
        super().setup(stage)
        assert self.drafter is not None
        if self.drafter.features != (PRE_NORM,):
            raise ValueError(
                f"JointDraftModule trains heads over the last state, and {type(self.drafter).__name__} reads "
                f"{', '.join(self.drafter.features)}; use a family that reads {PRE_NORM} alone"
            )
        if self.adapted is None:
            whole = Target.load(
                self.target, "float32", "cpu", revision=self.revision, trust_remote_code=self.trust_remote_code
            )
            self.adapted = AdaptedTarget(whole, self.target_lora)

    def _to_device(self) -> None:
        super()._to_device()
        assert self.adapted is not None
        self.adapted.to_device(self.device)

    def training_step(self, batch: CacheBatch, batch_idx: int) -> Tensor:
        """See :meth:`DraftModule.training_step`; behind the first steps with the adapter's loss.

        Args:
            batch: packed samples.
            batch_idx: of the epoch.
        """
        assert self.adapted is not None
        settings = self.target_lora
        if self.global_step < settings.heads_first * self.trainer.estimated_stepping_batches:
            # The adapter is still zero: its states are those of the cache. The sum keeps its weights in the graph.
            return super().training_step(batch, batch_idx) + 0.0 * sum(
                weight.sum() for weight in self.adapted.parameters()
            )
        adapted_TD = self.adapted.states(batch.packed)
        closeness = kept(batch.packed, adapted_TD, self.ends)
        heads_loss = super().training_step(_over(batch, _scaled(adapted_TD, settings.heads_weight)), batch_idx)
        if (self.global_step + 1) % self.metrics_every == 0:
            self._log_scalars({"train/kept_divergence": float(closeness.divergence)})
        return heads_loss + settings.keep_weight * closeness.divergence

    def on_validation_epoch_start(self) -> None:
        """See :meth:`DraftModule.on_validation_epoch_start`."""
        super().on_validation_epoch_start()
        self._kept_sums = []

    @torch.no_grad()
    def validation_step(self, batch: CacheBatch, batch_idx: int) -> None:
        """See :meth:`DraftModule.validation_step`: over the adapted states; and how close they are to the target's.

        Args:
            batch: packed samples.
            batch_idx: of the validation.
        """
        assert self.adapted is not None
        adapted_TD = self.adapted.states(batch.packed)
        closeness = kept(batch.packed, adapted_TD, self.ends)
        self._kept_sums.append((float(closeness.divergence), float(closeness.same_choice)))
        super().validation_step(_over(batch, adapted_TD), batch_idx)

    def on_validation_epoch_end(self) -> None:
        """See :meth:`DraftModule.on_validation_epoch_end`."""
        super().on_validation_epoch_end()
        if self._kept_sums:
            divergences, shares = zip(*self._kept_sums, strict=True)
            self.log("val/kept_divergence", sum(divergences) / len(divergences), batch_size=1)
            self.log("val/same_choice", sum(shares) / len(shares), batch_size=1)

    def _groups(self) -> list[dict[str, Any]]:
        assert self.adapted is not None
        own = {"params": list(self.adapted.parameters()), "weight_decay": 0.0, "lr": self.target_lora.lr}
        return [*super()._groups(), own]

    def save_drafter(self, folder: Path) -> None:
        """Write the heads, bound to the adapted model, and in ``target_adapter`` the adapter that makes it.

        Args:
            folder: existing and empty.
        """
        assert self.adapted is not None
        self.adapted.save(folder / TARGET_ADAPTER, self.target)
        config = self.evaluated.config
        own = config.target_fingerprint
        config.target_fingerprint = target_fingerprint(self.target, self.revision, str(folder / TARGET_ADAPTER))
        try:
            super().save_drafter(folder)
        finally:
            config.target_fingerprint = own

    def ends_of(self, folder: Path) -> TargetEnds:
        """See :meth:`DraftModule.ends_of`: those of the adapted model.

        Args:
            folder: what :meth:`save_drafter` wrote.
        """
        adapter = str(folder / TARGET_ADAPTER)
        return TargetEnds.load(self.target, torch.float32, "cpu", self.revision, adapter, self.trust_remote_code)


def _over(batch: CacheBatch, states_TD: Tensor) -> CacheBatch:
    """The batch with other states [T, D]."""
    return CacheBatch(replace(batch.packed, hidden={PRE_NORM: states_TD}), batch.sample_ids)


def _scaled(states: Tensor, weight: float) -> Tensor:
    """The same states, through which gradients flow back times a weight."""
    return states.detach() + weight * (states - states.detach())
