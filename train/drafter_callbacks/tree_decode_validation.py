"""Real tree decoding as the validation metric.

Owns: decoding held-out prompts with the current weights. Does not know: losses, optimisers.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

import pytorch_lightning as pl
from pytorch_lightning.utilities.rank_zero import rank_zero_info

from draftsmith.decode.engine import Engine
from draftsmith.decode.model_settings import for_target
from draftsmith.decode.sampling import GenerationSettings
from draftsmith.models.branches import check_branches, followed
from draftsmith.models.drafters.registry import default_limits
from draftsmith.models.files.device_and_dtype import resolved_dtype
from draftsmith.models.target.target import Target
from draftsmith.models.tree.limits import DraftLimits
from draftsmith.models.tree.shapes import parse_shape
from draftsmith.train.batches.online import OnlineDataModule
from draftsmith.train.drafter.joint_module import JointDraftModule
from draftsmith.train.drafter.module import DraftModule
from draftsmith.train.drafter_callbacks.acceptance_metrics import log_acceptance
from draftsmith.train.drafter_callbacks.decode_validation import DecodeValidation
from draftsmith.train.drafter_callbacks.drafter_run import module_and_data


class TreeDecodeValidation(DecodeValidation):
    """Decodes held-out prompts with the real engine and the current weights at every validation.

    Logs `val/tokens_per_step`: emitted tokens per target forward after the prefill, bonus token counted, pooled over the prompts. It is
    what ModelCheckpoint should monitor, with mode max. Also logs `val/accept_depth{d}`: the share of cycles that accept at least d draft
    tokens. The prompts are those of the validation samples. Each rank decodes its share; ranks that hold the target together decode all.

    Args:
        num_prompts: at most so many prompts.
        max_new_tokens: budget of each.
        draft_length: drafted tokens a cycle; null takes the module's num_steps.
        beam_width: beams.
        node_budget: at most so many drafted nodes are verified; null for no limit.
        shape: the draft's shape as `draftsmith evaluate --shapes` reads it: `10x6n60`, `t3.2.1`, `tree:FILE.json`, or with a
            temperature `s1.1.1`; instead of the three settings above. Without any of them the family's own shape, else a chain.
        batch_size: prompts decoded together.
        dtype: of the target; `auto` is its checkpoint's own on CUDA, float32 elsewhere. A target that is in memory already, for states in
            the loop, is used as it is.
        temperature: of the replies; 0 is greedy.
        time_share: decoding may take this share of the training time: 0.15 for 15 %. The first validation finds out how many prompts that
            allows, one batch at least. Later validations decode the same ones. null decodes all of them.

    Raises:
        ValueError: a shape beside the settings that it replaces; at the start of a fit, no held-out sample with a prompt, or a draft deeper
            than the drafter can make.
    """

    def __init__(
        self,
        num_prompts: int = 16,
        max_new_tokens: int = 64,
        draft_length: int | None = None,
        beam_width: int = 1,
        node_budget: int | None = None,
        batch_size: int = 8,
        dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto",
        time_share: float | None = 0.15,
        shape: str | None = None,
        temperature: float = 0.0,
    ) -> None:
        super().__init__(num_prompts, batch_size, time_share)
        self.max_new_tokens = max_new_tokens
        self.draft_length, self.beam_width, self.node_budget = draft_length, beam_width, node_budget
        self.limits = None if shape is None else parse_shape(shape)
        if shape is not None and (draft_length, beam_width, node_budget) != (None, 1, None):
            raise ValueError(
                f"shape {shape!r} says all of draft_length, beam_width and node_budget; leave those three out"
            )
        self.dtype = dtype
        self.target: Target | None = None
        self._prompts: list[list[int]] = []
        self._settings = GenerationSettings(max_new_tokens, temperature)

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Loads the whole target, or takes the one that states come from in the loop, and picks the prompts.

        Args:
            trainer: of the run.
            pl_module: in training.
            stage: `fit` or another of Lightning's.

        Raises:
            ValueError: no held-out sample has a prompt, or the run trains something else than a drafter, or an adapter of the target too.
        """
        if self.target is not None:
            return
        module, data = module_and_data(trainer, pl_module)
        if isinstance(module, JointDraftModule):
            raise ValueError(
                "TreeDecodeValidation decodes with the target itself, and JointDraftModule trains heads of the adapted one; leave the "
                "callback out, and let KeepBestDrafter monitor val/proxy_tokens_per_step"
            )
        self._prompts = data.val_prompts(self.num_prompts)
        if not self._prompts:
            raise ValueError("no held-out sample has a prompt to decode; give val_cache or a val_fraction above 0")
        if isinstance(data, OnlineDataModule):
            self.target = data.target
        else:
            device = str(trainer.strategy.root_device)
            self.target = Target.load(
                module.target,
                resolved_dtype(self.dtype, module.target, device, module.revision, module.trust_remote_code),
                revision=module.revision,
                adapter=module.adapter,
                trust_remote_code=module.trust_remote_code,
                context=module.context,
            )
        self._settings = for_target(replace(self._settings, eos_token_ids=self.target.eos_token_ids), self.target)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Starts the clock of the training time.

        Args:
            trainer: of the run.
            pl_module: in training.

        Raises:
            ValueError: a draft deeper than the drafter can make, or a shape that is a tree with a target that keeps a recurrent state.
        """
        module, _ = module_and_data(trainer, pl_module)
        limits = self.limits_for(module)
        module.evaluated.check_depth(limits)
        if self.target is not None:
            check_branches(self.target, (limits,))
            if limits != self._asked_limits(module):
                rank_zero_info(
                    f"{self.target.name} keeps a recurrent state: validation drafts chains of {limits.draft_length}, not trees"
                )
        super().on_train_start(trainer, pl_module)

    def on_validation_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Decodes and logs."""
        module, data = module_and_data(trainer, pl_module)
        assert self.target is not None
        own = range(trainer.global_rank, len(self._prompts), trainer.world_size)
        if not isinstance(data, OnlineDataModule):
            self.target.to(module.device)
        elif data.over.is_sharded:
            # Processes that hold a target together must run its forwards together.
            own = range(data.over.group, len(self._prompts), data.over.num_groups)
        limits = self.limits_for(module)
        module.settle_score_scale()
        engine = Engine(self.target, module.evaluated, limits)
        generations = self.decode(trainer, engine, self._prompts, own, self._settings)
        log_acceptance(module, generations, limits.draft_length)

    def limits_for(self, module: DraftModule) -> DraftLimits:
        """How a module's drafter drafts.

        Args:
            module: with the drafter.

        Returns:
            What was asked for. A target that keeps a recurrent state gets chains where the width was not named as a shape.
        """
        limits = self._asked_limits(module)
        return limits if self.limits is not None or self.target is None else followed(self.target, limits)

    def _asked_limits(self, module: DraftModule) -> DraftLimits:
        """What the settings ask for, whatever the target can follow."""
        if self.limits is not None:
            return self.limits
        length = self.draft_length or module.objective.num_steps
        limits = DraftLimits(beam_width=self.beam_width, draft_length=length, node_budget=self.node_budget)
        is_given = (self.draft_length, self.beam_width, self.node_budget) != (None, 1, None)
        return limits if is_given else default_limits(module.evaluated, limits)
