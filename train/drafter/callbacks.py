"""What training watches and keeps: real tree decoding as the validation metric, throughput, the best drafter on disk.

Owns: decoding held-out prompts with the current weights, tokens per second, the exported drafter folder. Does not know:
losses, optimisers.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar, Literal

import pytorch_lightning as pl
import torch
from pytorch_lightning.utilities.rank_zero import rank_zero_warn

from draftsmith import provenance
from draftsmith.decode.batch import Generation
from draftsmith.decode.engine import Engine
from draftsmith.decode.model_settings import for_target
from draftsmith.decode.sampling import GenerationSettings
from draftsmith.files import atomic_directory
from draftsmith.models.drafters.drafter_folder import load_drafter
from draftsmith.models.drafters.registry import default_limits
from draftsmith.models.files.device_and_dtype import resolved_dtype
from draftsmith.models.target.target import Target
from draftsmith.models.tree.limits import DraftLimits
from draftsmith.models.tree.shapes import parse_shape
from draftsmith.ownership import check_replaceable
from draftsmith.train.batches.data_module import CacheBatch, CacheDataModule
from draftsmith.train.batches.online import OnlineDataModule
from draftsmith.train.drafter.decode_budget import DecodeValidation
from draftsmith.train.drafter.module import DraftModule
from draftsmith.train.run.collectives import sum_over_ranks

TOKENS_PER_STEP = "val/tokens_per_step"


class TreeDecodeValidation(DecodeValidation):
    """Decodes held-out prompts with the real engine and the current weights at every validation.

    Logs `val/tokens_per_step` (emitted tokens per target forward after the prefill, bonus token counted, pooled over
    the prompts: what ModelCheckpoint should monitor, mode max) and `val/accept_depth{d}` (share of cycles that accept
    at least d draft tokens). The prompts are those of the validation samples; each rank decodes its share,
    or where ranks hold the target together all of them.

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
        time_share: decoding may take this share of the training time: 0.15 for 15 %. The first validation finds out for how many
            of the prompts that is enough, one batch at least; later ones decode the same. null decodes all of them.

    Raises ValueError for a shape beside the settings that it replaces; at the start of a fit when no held-out sample has
    a prompt, or for a draft deeper than the drafter can make.
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
        """Loads the whole target, or takes the one that states come from in the loop, and picks the prompts."""
        if self.target is not None:
            return
        module, data = _expect(trainer, pl_module)
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
        """Training time counts from here. Refuses a draft that is deeper than the drafter can make."""
        module, _ = _expect(trainer, pl_module)
        module.evaluated.check_depth(self.limits_for(module))
        super().on_train_start(trainer, pl_module)

    def on_validation_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Decodes and logs."""
        module, data = _expect(trainer, pl_module)
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
        """How drafts are made of a module's drafter."""
        if self.limits is not None:
            return self.limits
        length = self.draft_length or module.objective.num_steps
        limits = DraftLimits(beam_width=self.beam_width, draft_length=length, node_budget=self.node_budget)
        is_given = (self.draft_length, self.beam_width, self.node_budget) != (None, 1, None)
        return limits if is_given else default_limits(module.evaluated, limits)


def log_acceptance(module: pl.LightningModule, generations: Sequence[Generation], draft_length: int) -> None:
    """Logs tokens per step and acceptance by depth, pooled over what all processes decoded. Collective."""
    sums = acceptance_sums(generations, draft_length).to(module.device)
    if module.trainer.world_size > 1:
        torch.distributed.all_reduce(sums)
    emitted, cycles, *reached = sums.tolist()
    cycles = max(1.0, cycles)
    module.log(TOKENS_PER_STEP, emitted / cycles, prog_bar=True, batch_size=1)
    by_depth = {f"val/accept_depth{depth}": count / cycles for depth, count in enumerate(reached, 1)}
    module.log_dict(by_depth, batch_size=1)


def acceptance_sums(generations: Sequence[Generation], draft_length: int) -> torch.Tensor:
    """float64 [2 + draft_length]: emitted tokens after the prefill's, cycles, cycles that accepted at least 1, 2, ... .

    Example: one generation of 6 tokens in cycles that accepted 2 and 1 -> (5, 2, 2, 1) for a draft length of 2.
    """
    sums = torch.zeros(2 + draft_length, dtype=torch.float64)
    for generation in generations:
        sums[0] += len(generation.token_ids) - 1
        sums[1] += len(generation.accepted)
        for accepted in generation.accepted:
            sums[2 : 2 + accepted] += 1
    return sums


class Throughput(pl.Callback):
    """Shows and logs labelled (assistant) tokens trained on per second, over all ranks, validation time left out."""

    def __init__(self, every: int = 10) -> None:
        if every < 1:
            raise ValueError(f"every is {every}; it must be at least 1")
        self.every = every
        self._tokens: torch.Tensor | int = 0
        self._started = 0.0

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Starts the clock unless it runs on from the last batch, whose loading time counts too."""
        if not self._started:
            self._started = time.perf_counter()

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: CacheBatch, batch_idx: int
    ) -> None:
        """Adds the batch, and reports once enough have come together."""
        # Left on the device until it is reported: reading it would wait for the step at every batch.
        self._tokens = self._tokens + batch.packed.loss_mask.sum()
        if (batch_idx + 1) % self.every:
            return
        if pl_module.device.type == "cuda":
            torch.cuda.synchronize(pl_module.device)
        now = time.perf_counter()
        tokens = sum_over_ranks(pl_module, torch.as_tensor(self._tokens, device=pl_module.device))
        rate = int(tokens) / max(1e-9, now - self._started)
        pl_module.log("train/tokens_per_second", rate, prog_bar=True, batch_size=1)
        self._tokens, self._started = 0, now

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Drops a window that validation would fall into."""
        self._tokens, self._started = 0, 0.0


class KeepBestDrafter(pl.Callback):
    """Keeps the best drafter so far as an ordinary saved model, ready for `draftsmith export`.

    The folder holds `config.json`, `model.safetensors` and `provenance.json` (of a run with `lora` the adapter instead:
    `adapter_config.json`, `adapter_model.safetensors`, `bond.json`), and is replaced as a whole. Best is
    judged by `monitor`; where no such metric is logged, the latest counts as best.

    Args:
        directory: where; null takes `drafter` in the trainer's default_root_dir.
        monitor: a logged metric.
        mode: whether more of it is better.
        replace: may replace what another run kept there. `draftsmith train fit --replace_best true` sets it.

    Raises ValueError at the start of training where the folder holds what another run kept, or anything else.
    """

    stage: ClassVar[str] = "draftsmith train (best drafter)"
    name: ClassVar[str] = "drafter"

    def __init__(
        self,
        directory: Path | None = None,
        monitor: str = TOKENS_PER_STEP,
        mode: Literal["max", "min"] = "max",
        replace: bool = False,
    ) -> None:
        self.directory, self.monitor, self.mode, self.replace = directory, monitor, mode, replace
        self.best: float | None = None
        self.run = secrets.token_hex(8)

    def state_dict(self) -> dict[str, Any]:
        """The best value, so that a resumed run does not replace a better drafter; and which run it is, so that it may replace its own."""
        return {"best": self.best, "run": self.run}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """See state_dict."""
        self.best = state_dict["best"]
        self.run = state_dict.get("run", self.run)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Refuses a folder that is not this run's own before anything is trained. All processes stop together."""
        found = self._found(trainer, pl_module) if trainer.is_global_zero else ("", False)
        problem, is_own = trainer.strategy.broadcast(found)
        if problem:
            raise ValueError(problem)
        if self.best is not None and not is_own:
            rank_zero_warn(
                f"{self._folder(trainer)} no longer holds the best {self.name} of this run ({self.monitor} {self.best:.4g}); "
                "the best from now on is kept there"
            )
            self.best = None

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Saves if the metric has improved."""
        if trainer.sanity_checking or trainer.state.fn != "fit":
            return
        value = trainer.callback_metrics.get(self.monitor)
        if value is None:
            self._keep(trainer, pl_module)
            return
        sign = 1.0 if self.mode == "max" else -1.0
        # The first process decides: a metric may differ between them, and all must come to _save or none.
        measured = trainer.strategy.broadcast(float(value))
        if self.best is None or sign * measured > sign * self.best:
            self.best = measured
            self._keep(trainer, pl_module)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Saves the last weights of a run that never validated or has no metric."""
        if self.best is None:
            self._keep(trainer, pl_module)

    def _found(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> tuple[str, bool]:
        """Why the best must not go where it is to go, or nothing; and whether this run's own best is there."""
        folder = self._folder(trainer)
        try:
            check_replaceable(folder, self.stage, self._inputs(pl_module))
            is_free = not folder.is_dir() or not any(folder.iterdir())
            is_own = not is_free and _run_of(folder) == self.run
        except (ValueError, OSError) as error:
            return str(error), False
        if is_free or is_own or self.replace:
            return "", is_own
        return (
            f"{folder} holds the best {self.name} of another run. To resume that run, give --ckpt_path last; to keep it, give "
            "another --trainer.default_root_dir; to replace it, give --replace_best true"
        ), False

    def _inputs(self, pl_module: pl.LightningModule) -> list[Path]:
        """What must not be replaced by what this run trains, whoever wishes it."""
        return pl_module.beginning.needed() if isinstance(pl_module, DraftModule) else []

    def _folder(self, trainer: pl.Trainer) -> Path:
        return Path(self.directory or Path(trainer.default_root_dir) / self.name)

    def _keep(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._save(trainer, pl_module)
        # No process continues, and perhaps reads the folder, before the first one has written it.
        trainer.strategy.barrier("the kept folder is written")

    def _save(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        module, data = _expect(trainer, pl_module)
        module.whole_drafter()  # on every process, since each may hold a share of it
        if not trainer.is_global_zero:
            return
        config = {**module.settings(), **self._moment(trainer), **_data_settings(data)}
        identity = data.open_cache().manifest.identity
        inputs = {str(data.cache_path): identity.source, module.target: identity.target_fingerprint}
        with atomic_directory(self._folder(trainer), self.stage) as partial:
            module.save_drafter(partial)
            load_drafter(partial)  # what is kept can be used: a training that diverged leaves NaN
            provenance.write(partial, provenance.record(provenance.command_line(), config, inputs))

    def _moment(self, trainer: pl.Trainer) -> dict[str, Any]:
        """For provenance: which run, at which step, and how good."""
        metrics = {name: float(value) for name, value in trainer.callback_metrics.items()}
        return {"run": self.run, "step": trainer.global_step, "metrics": metrics}


def _run_of(folder: Path) -> str | None:
    """The run that kept what is in a folder."""
    config = provenance.read(folder).get("config")
    return config.get("run") if isinstance(config, dict) else None


def _data_settings(data: CacheDataModule) -> dict[str, Any]:
    manifest = data.open_cache().manifest
    return {
        "data": {
            "cache": str(data.cache_path),
            "samples": manifest.num_samples,
            "tokens": manifest.num_tokens,
            "labelled_tokens": manifest.num_labelled,
            "tokens_per_batch": data.tokens_per_batch,
            "seed": data.seed,
        }
    }


def _expect(trainer: pl.Trainer, pl_module: pl.LightningModule) -> tuple[DraftModule, CacheDataModule]:
    data = getattr(trainer, "datamodule", None)
    if not isinstance(pl_module, DraftModule) or not isinstance(data, CacheDataModule):
        raise ValueError(
            f"this callback serves DraftModule with CacheDataModule, not {type(pl_module).__name__} with "
            f"{type(data).__name__}; remove it from trainer.callbacks"
        )
    return pl_module, data
