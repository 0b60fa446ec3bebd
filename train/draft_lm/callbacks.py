"""What distilling a draft LM watches and keeps: chains through the real decoder, and the best draft LM as a model directory.

Owns: decoding held-out prompts with the current weights, the saved folder. Does not know: divergences, sampling, optimisers.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar, Literal

import pytorch_lightning as pl

from draftsmith import provenance
from draftsmith.decode.engine import Engine
from draftsmith.decode.model_settings import for_target
from draftsmith.decode.sampling import GenerationSettings
from draftsmith.files import atomic_directory
from draftsmith.models.files.device_and_dtype import as_dtype
from draftsmith.models.tree.shapes import parse_shape
from draftsmith.train.draft_lm.module import DraftLMModule
from draftsmith.train.drafter_callbacks.acceptance_metrics import TOKENS_PER_STEP, log_acceptance
from draftsmith.train.drafter_callbacks.decode_validation import DecodeValidation
from draftsmith.train.drafter_callbacks.keep_best_drafter import KeepBestDrafter


class ChainDecodeValidation(DecodeValidation):
    """Decodes held-out prompts with the real engine, the target and the draft LM's current weights, at every validation.

    Logs `val/tokens_per_step`: emitted tokens per target forward after the prefill, bonus token counted, pooled over the prompts. Also logs
    `val/accept_depth{d}`: the share of cycles that accept at least d draft tokens. Each rank decodes its share of the prompts, or all of
    them where the target is sharded.

    Args:
        num_prompts: at most so many prompts.
        max_new_tokens: budget of each.
        shape: how much to draft: 1x4 is a chain of four; s1.1.1.1 a sampled one, for a temperature above 0.
        temperature: of the target; 0 is greedy.
        batch_size: prompts decoded together.
        time_share: decoding may take this share of the training time: 0.15 for 15 %. The first validation finds out for how many
            of the prompts that is enough, one batch at least; later ones decode the same. null decodes all of them.

    Raises:
        ValueError: a shape that cannot be read, or a count below 1; at a validation, no held-out prompts.
    """

    def __init__(
        self,
        num_prompts: int = 16,
        max_new_tokens: int = 64,
        shape: str = "1x4",
        temperature: float = 0.0,
        batch_size: int = 8,
        time_share: float | None = 0.15,
    ) -> None:
        super().__init__(num_prompts, batch_size, time_share)
        self.limits = parse_shape(shape)
        if self.limits.sampled is not None and temperature == 0.0:
            raise ValueError(f"the shape {shape} is sampled; give a temperature above 0, or a chain such as 1x4")
        self.settings = GenerationSettings(max_new_tokens=max_new_tokens, temperature=temperature)

    def on_validation_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Decodes and logs.

        Args:
            trainer: of the run.
            pl_module: a DraftLMModule.

        Raises:
            ValueError: no row is held out, or the run trains something else than a draft LM.
        """
        module = _expect(pl_module)
        prompts = module.data().val_prompts(self.num_prompts)
        if not prompts:
            raise ValueError("no row is held out to decode; give the data a val_fraction above 0")
        settings = for_target(replace(self.settings, eos_token_ids=module.eos_token_ids), module.target)
        engine = Engine(module.target, module.student.drafter(), self.limits)
        own = range(trainer.global_rank, len(prompts), trainer.world_size)
        if module.target_choice.is_sharded:
            own = range(len(prompts))  # processes that hold the target together must run its forwards together
        generations = self.decode(trainer, engine, prompts, own, settings)
        log_acceptance(module, generations, self.limits.draft_length)


class KeepBestDraftLM(KeepBestDrafter):
    """Keeps the best draft LM so far as a model directory that `draftsmith decode --drafter` and `evaluate --drafters` take.

    The folder holds `config.json` and safetensors, or with LoRA the adapter as PEFT writes it (which names its base); the tokenizer; and
    `provenance.json`. It is replaced as a whole. `monitor` decides which one is best; where no such metric is logged, the latest one is.

    Args:
        directory: where; null takes `draft_lm` in the trainer's default_root_dir.
        monitor: a logged metric.
        mode: whether more of it is better.
        dtype: of a whole model's saved weights; null keeps that of training.
        replace: as in KeepBestDrafter.
    """

    stage: ClassVar[str] = "draftsmith train (best draft LM)"
    name: ClassVar[str] = "draft_lm"

    def __init__(
        self,
        directory: Path | None = None,
        monitor: str = TOKENS_PER_STEP,
        mode: Literal["max", "min"] = "max",
        dtype: Literal["float32", "bfloat16", "float16"] | None = None,
        replace: bool = False,
    ) -> None:
        super().__init__(directory, monitor, mode, replace)
        self.dtype = None if dtype is None else as_dtype(dtype)

    def _inputs(self, pl_module: pl.LightningModule) -> list[Path]:
        module = _expect(pl_module)
        return (
            [] if module.lora is None else [Path(module.student.path)]
        )  # an adapter is nothing without what is below it

    def _save(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        module = _expect(pl_module)
        if not trainer.is_global_zero:
            return
        data, student = module.data(), module.student
        rows: dict[str, Any] = {
            "rows": len(data.train_rows),
            "on_policy": data.on_policy,
            "batch_size": data.batch_size,
            "max_length": data.max_length,
            "trained_on": data.trained_on.as_text,
            "seed": data.seed,
        }
        config = {**module.settings(), **self._moment(trainer), "data": rows}
        inputs = {
            **data.sources,
            module.target_choice.name: module.target.fingerprint,
            student.path: student.fingerprint,
        }
        with atomic_directory(self._folder(trainer), self.stage) as partial:
            student.save(partial, module.tokenizer, self.dtype)
            provenance.write(partial, provenance.record(provenance.command_line(), config, inputs))


def _expect(pl_module: pl.LightningModule) -> DraftLMModule:
    if not isinstance(pl_module, DraftLMModule):
        raise ValueError(
            f"this callback serves DraftLMModule, not {type(pl_module).__name__}; remove it from trainer.callbacks"
        )
    return pl_module
