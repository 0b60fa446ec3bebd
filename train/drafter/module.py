"""Training a drafter against a frozen target, for any family.

Owns: building the drafter, the optimiser and its schedule, the normalisation over ranks, teacher-forced validation. Does not
know: how samples are stored or batched, how weights are spread or averaged, real decoding (a callback's business), files of a run.

Only the target's ends (embedding, final norm, head) are loaded: its states come from the cache. A family that learns through the target's
blocks needs all of it.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import pytorch_lightning as pl
import torch
from pytorch_lightning.utilities.types import OptimizerLRSchedulerConfig
from torch import Tensor

from draftsmith.data.cache.reader import HiddenStateCache
from draftsmith.models.drafters.drafter import Drafter
from draftsmith.models.drafters.family import DrafterFamily, fresh_drafter
from draftsmith.models.drafters.registry import recorded_settings
from draftsmith.models.files.device_and_dtype import as_dtype, resolved_dtype
from draftsmith.models.files.fingerprint import tokenizer_fingerprint
from draftsmith.models.files.loading import load_tokenizer
from draftsmith.models.target.target import PRE_NORM, Target, TargetEnds
from draftsmith.train.batches.cache_subset import CacheBatch
from draftsmith.train.batches.data_module import CacheDataModule
from draftsmith.train.batches.labelled_text import LARGE, LabelledText, VocabularyRule
from draftsmith.train.batches.online import OnlineDataModule
from draftsmith.train.drafter.batch_seed import batch_seed
from draftsmith.train.drafter.finite_loss import FiniteLoss, not_finite
from draftsmith.train.drafter.metrics import means, pool
from draftsmith.train.drafter.objective import Distillation, Objective, PreparedBatch, inverse_draft_ids, prepare, run
from draftsmith.train.drafter.served_copy import ServedCopy, pop_average
from draftsmith.train.drafter.starting_drafter import LoraSettings, StartingDrafter, check_mask
from draftsmith.train.drafter.text_validation import TextValidation
from draftsmith.train.drafter.vocabulary_choice import VocabularyChoice
from draftsmith.train.losses.chunk_rows import chosen_chunk_rows
from draftsmith.train.losses.divergences import HeadDivergence
from draftsmith.train.losses.sums import TopEmphasis
from draftsmith.train.run.checkpoints import check_fits
from draftsmith.train.run.collectives import sum_over_ranks, world_size
from draftsmith.train.run.schedule import adamw, check_ratios, warm_up_then_cosine, weight_groups
from draftsmith.train.run.strategies import divides_weights, refuse_other_engines


class DraftModule(pl.LightningModule):
    """A drafter in training.

    The arguments stay flat, without groups, because they are the keys of users' YAML files.

    Args:
        target: the frozen target: a model directory, a hub id, or `embedded:target`.
        drafter: which family to train, with its settings.
        num_steps: draft steps K trained on; drafting longer than this is untrained.
        distillation: what teaches. `none`: the tokens of the text. `path`: the target's own distribution at each
            position of the text, free from the cached states, by `divergence`. `local`: the target's greedy continuation from every
            position; needs a cache made with --local-horizon num_steps + 1.
        horizon_decay: step k (from 0) weighs horizon_decay ** k.
        feature_weight: weight of smooth L1 on the predicted feature, for drafters that predict it; arXiv 2401.15077 uses 1.0.
        logit_weight: weight of the loss on tokens; arXiv 2401.15077 uses 0.1.
        top_k_weight: weight of HASS's extra loss on the target's `top_k` likeliest tokens; needs distillation path.
        top_k: how many of the target's likeliest tokens that loss compares.
        skip_outside: with distillation path, learn nothing where the target's likeliest token is outside the draft
            vocabulary (arXiv 2503.01840).
        max_anchors: learn at no more positions of a batch than this, drawn at random in each; null takes all. For
            drafters whose blocks start at every such position, memory grows with it.
        val_steps: draft steps of the validation's accuracies; null takes num_steps.
        lr: peak learning rate.
        betas: AdamW's decay rates of its two running averages.
        weight_decay: AdamW's, on matrices only.
        warmup_ratio: share of all steps over which the rate rises linearly.
        min_lr_ratio: the rate falls on a cosine to this share of its peak.
        ema_decay: validate and save a running average of the weights with this decay; null uses the weights themselves.
        chunk_rows: rows of logits in memory at a time; null chooses by the vocabulary, and on CUDA by the free memory.
        metrics_every: show the loss, and compute top-1 and top-5 of the training batch, every so many steps.
        ends_dtype: dtype of the target's ends; `auto` is its checkpoint's own on CUDA, float32 elsewhere.
        revision: of the target on the hub.
        adapter: a PEFT adapter on top of the target.
        trust_remote_code: run Python files that come with the target; read them first.
        context: most tokens that the target reads; null takes it from its config, as serving engines derive it.
        init_from: start from the weights of this drafter: a folder of an earlier training, or of `draftsmith export` (which also reads the
            layouts of other software). null starts with new weights.
        lora: train a low-rank adapter of the drafter of init_from and nothing else: `rank`, `alpha`, `dropout`,
            `target_modules`; null trains all weights.
        draft_vocabulary: `auto`: where the target has more than 65,536 tokens, the drafter scores only the 32,768 that are labelled most
            often in the training samples. `covering`: the fewest of these tokens (a power of two) that hold 95 % of the held-out ones.
            null: as the drafter's draft_vocab_size says.
        allow_other_target: the drafter of init_from may belong to another target of the same sizes and tokenizer, such as the one that
            yours was fine-tuned from. The trained drafter belongs to yours.
        prompt_weight: learn at the positions of prompts too, each counting so much where one of a reply counts 1. Their states are in the
            cache already. 0 learns replies alone. With distillation none, what is learned there is the prompt's own text.
        divergence: with distillation path, what is minimised: `forward_kl`; `reverse_kl`; `total_variation`, which is 1 - the acceptance at
            temperature 1; `l1`, twice that; `negative_log_acceptance`; or `lk_hybrid`, which begins as forward KL and ends as total
            variation.
        text_weight: with distillation path, the share of the text's own cross-entropy in the loss on tokens. DSpark (arXiv 2607.05147)
            takes 0.1 beside `l1`.
        d_pace: weigh each draft step by how many accepted tokens depend on it (D-PACE, arXiv 2605.18810), with this smoothing, 0.5 in the
            paper; null weighs by horizon_decay alone.
        confidence_weight: weight of the loss of a confidence head, beside that on tokens; null is 1 where the drafter has one.
        depth_share: where steps can be left out: step k learns at this share, to the power of k, of the anchors that reach it, drawn at
            random, and at no less than a fifth of them. The paper (arXiv 2602.01469) takes 0.7; 1 learns every step of every anchor.

    Raises:
        ValueError: settings out of range; in setup(), a cache of another target or tokenizer, or without the layers that the drafter reads;
            in training, a loss that is not finite.
    """

    may_be_divided = True  # by the strategies of run/strategies.py
    vocabulary_rule: VocabularyRule = LARGE
    trains_in_bf16 = True  # where nobody sets the precision and the device can

    def __init__(
        self,
        target: str,
        drafter: DrafterFamily,
        num_steps: int = 5,
        distillation: Distillation = "none",
        horizon_decay: float = 1.0,
        feature_weight: float = 0.0,
        logit_weight: float = 1.0,
        top_k_weight: float = 0.0,
        top_k: int = 10,
        skip_outside: bool = False,
        val_steps: int | None = None,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.98),
        weight_decay: float = 0.0,
        warmup_ratio: float = 0.05,
        min_lr_ratio: float = 0.0,
        ema_decay: float | None = None,
        chunk_rows: int | None = None,
        metrics_every: int = 10,
        ends_dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto",
        revision: str | None = None,
        adapter: str | None = None,
        trust_remote_code: bool = False,
        context: int | None = None,
        init_from: Path | None = None,
        lora: LoraSettings | None = None,
        allow_other_target: bool = False,
        draft_vocabulary: Literal["auto", "covering"] | None = None,
        max_anchors: int | None = None,
        prompt_weight: float = 0.0,
        divergence: HeadDivergence = "forward_kl",
        text_weight: float = 0.0,
        d_pace: float | None = None,
        confidence_weight: float | None = None,
        depth_share: float = 1.0,
    ) -> None:
        super().__init__()
        self.draft_vocabulary = draft_vocabulary
        VocabularyChoice(draft_vocabulary, drafter.draft_vocab_size).check(init_from)
        emphasis = TopEmphasis(top_k_weight, top_k) if top_k_weight else None
        weighed = (feature_weight, logit_weight, emphasis, skip_outside, max_anchors, prompt_weight)
        own = Objective(num_steps, distillation, horizon_decay, chunk_rows, *weighed)
        further: dict[str, Any] = {"divergence": divergence, "text_weight": text_weight, "d_pace": d_pace}
        self.objective = replace(own, **further, confidence_weight=confidence_weight, depth_share=depth_share)
        self.validation = TextValidation(
            Objective(val_steps or num_steps, "none", 1.0, chunk_rows, max_anchors=max_anchors)
        )
        check_ratios(warmup_ratio=warmup_ratio, min_lr_ratio=min_lr_ratio)
        _check_numbers(ema_decay, metrics_every)
        self.target, self.revision, self.adapter = target, revision, adapter
        self.trust_remote_code, self.context, self.metrics_every = trust_remote_code, context, metrics_every
        self.starting_drafter = StartingDrafter(init_from, lora, allow_other_target)
        self._base_fingerprint = ""  # fingerprint of the drafter of init_from
        self.family, self.ends_dtype = drafter, str(ends_dtype)
        self.lr, self.betas, self.weight_decay = lr, betas, weight_decay
        self.warmup_ratio, self.min_lr_ratio, self.ema_decay = warmup_ratio, min_lr_ratio, ema_decay
        self._begin_empty()

    def _begin_empty(self) -> None:
        """What setup() and the run fill in."""
        self.drafter: Drafter | None = None
        # In a list, so that the frozen ends are neither parameters nor part of a checkpoint.
        self._ends: list[TargetEnds] = []
        self._copy: ServedCopy | None = None
        self._to_draft = torch.empty(0, dtype=torch.int64)
        self._finite = FiniteLoss()
        self._eos_token_ids: tuple[int, ...] = ()
        self._noise_seed = 0

    @property
    def ends(self) -> TargetEnds:
        """The target's frozen ends.

        Raises:
            ValueError: setup() has not run.
        """
        if not self._ends:
            raise ValueError("the module is not set up; call setup() first")
        return self._ends[0]

    @property
    def evaluated(self) -> Drafter:
        """The drafter that is validated, decoded with and saved: the running average where there is one.

        Where it is averaged, or divided among processes, that is a copy. Each validation begins with whole_drafter(), which refreshes it.

        Raises:
            ValueError: setup() has not run.
        """
        chosen = self.drafter if self._copy is None else self._copy.drafter
        if chosen is None:
            raise ValueError("the module is not set up; call setup() first")
        return chosen

    def whole_drafter(self) -> Drafter:
        """The evaluated drafter with the weights of this moment, plain and in full, on the run's device.

        Collective: every process calls it.
        """
        if self._copy is not None:
            self._copy.refresh(self.trainer.strategy, self.device)
        return self.evaluated

    def settings(self) -> dict[str, Any]:
        """Every setting of the run that concerns the drafter, for provenance."""
        read = ("target", "revision", "adapter", "trust_remote_code", "context", "ends_dtype")
        learnt = ("lr", "betas", "weight_decay", "warmup_ratio", "min_lr_ratio", "ema_decay")
        chosen = {name: getattr(self, name) for name in (*read, *learnt, "draft_vocabulary")}
        return {
            **chosen,
            **self.starting_drafter.settings(),
            "drafter": recorded_settings(self.family),
            "objective": vars(self.objective),
        }

    def setup(self, stage: str) -> None:
        """Loads the target's ends, checks the cache against them, builds the drafter."""
        if self.drafter is not None:
            return
        refuse_other_engines(self.trainer.strategy)
        data = self._data()
        online = data if isinstance(data, OnlineDataModule) else None
        if online is not None and self.family.kind.learns_through_target:
            online.check_whole(self.family.kind.__name__)
        device = str(self.trainer.strategy.root_device)
        self.ends_dtype = resolved_dtype(self.ends_dtype, self.target, device, self.revision, self.trust_remote_code)
        dtype = as_dtype(self.ends_dtype)
        ends = None if online is None else online.ends(dtype)
        if ends is None or (self.family.kind.learns_through_target and ends.trunk is None):
            ends = self._load_ends(dtype, device)
        self._ends = [ends]
        own_tokenizer = tokenizer_fingerprint(load_tokenizer(self.target, self.revision, self.trust_remote_code))
        cache = data.open_cache()
        data.check_target(ends.fingerprint, ends.vocab_size)
        cache.check_tokenizer(own_tokenizer)
        self.drafter = self._make(data, ends, own_tokenizer)
        self.objective.check(self.drafter)
        self.validation.objective.check(self.drafter)
        layers = {
            *self.drafter.features,
            *([PRE_NORM] if self.objective.reads_features or self.drafter.has_confidence else []),
        }
        if online is None:
            _check_layers(sorted(layers), type(self.drafter).__name__, cache)
            data.read_layers(tuple(sorted(layers)))
        else:
            online.compute(tuple(sorted(layers)), self._num_greedy())
        if self.ema_decay is not None or divides_weights(self.trainer.strategy):
            self._copy = ServedCopy(self.drafter, ends, self.ema_decay is not None)
        self._to_draft = inverse_draft_ids(self.drafter.draft_ids(), ends.vocab_size)
        self._noise_seed = self.trainer.strategy.broadcast(torch.initial_seed())
        self._eos_token_ids = ends.eos_token_ids

    def _load_ends(self, dtype: torch.dtype, device: str) -> TargetEnds:
        """The target's ends: alone, or of a drafter that learns through the target, with all of it."""
        if not self.family.kind.learns_through_target:
            return TargetEnds.load(self.target, dtype, "cpu", self.revision, self.adapter, self.trust_remote_code)
        return Target.load(
            self.target,
            str(dtype).removeprefix("torch."),
            "cpu" if device.startswith("cpu") else device,  # DeepSpeed numbers CPUs, too
            revision=self.revision,
            adapter=self.adapter,
            trust_remote_code=self.trust_remote_code,
            context=self.context,
        ).ends

    def labelled_text(self) -> LabelledText:
        """What this run learns from, counted in a part of a large cache."""
        remarks = []
        data, objective = self._data(), self.objective
        if objective.prompt_weight > 0.0:
            remarks.append(
                f"it learns from {data.num_prompt_tokens()} prompt tokens too, each {objective.prompt_weight:g} times as much as a "
                "labelled one (prompt_weight)"
            )
        if objective.chunk_rows is not None:
            remarks.append(f"its loss works through {objective.chunk_rows} rows of logits at a time (chunk_rows)")
        is_new, size = self.starting_drafter.folder is None, len(self.evaluated.draft_ids())
        return self._vocabulary().labelled_text(data, self.ends.vocab_size, size, is_new, remarks)

    def _vocabulary(self) -> VocabularyChoice:
        return VocabularyChoice(self.draft_vocabulary, self.family.draft_vocab_size, self.vocabulary_rule)

    def save_drafter(self, folder: Path) -> None:
        """Writes what is evaluated: the drafter, or with lora its adapter.

        Args:
            folder: existing and empty.
        """
        self.starting_drafter.save(self.evaluated, self._base_fingerprint, folder)

    def ends_of(self, folder: Path) -> TargetEnds:
        """The ends of the model that a saved drafter is for.

        Args:
            folder: what :meth:`save_drafter` wrote.
        """
        return self.ends

    def _make(self, data: CacheDataModule, ends: TargetEnds, tokenizer: str) -> Drafter:
        """The drafter as training starts: fresh, or as init_from left it."""
        if self.starting_drafter.folder is not None:
            drafter, self._base_fingerprint = self.starting_drafter.adopt(self.family, ends, tokenizer)
            return drafter
        draft_token_ids = self._vocabulary().token_ids(data, ends.vocab_size)
        fresh = fresh_drafter(self.family, ends, draft_token_ids, self.objective.num_steps, tokenizer)
        return check_mask(fresh, ends)

    def configure_model(self) -> None:
        """Nothing: setup() has built the drafter, and strategies divide it. Lightning asks model-parallel runs for this."""

    def on_fit_start(self) -> None:
        """Brings what Lightning does not manage to the run's device."""
        self._to_device()

    def on_validation_start(self) -> None:
        """As on_fit_start, for a run that only validates; and takes the weights of this moment."""
        self._to_device()
        if self.trainer.state.fn == "fit" or self.ema_decay is None:
            self.whole_drafter()
        if self._copy is not None:
            self._copy.move(self.device)  # an average that is only validated came with the checkpoint

    def on_validation_end(self) -> None:
        """Between validations the copy waits on the CPU."""
        if self._copy is not None:
            self._copy.move("cpu")

    def on_train_end(self) -> None:
        """Leaves the last weights in what is evaluated."""
        self.whole_drafter()

    def _to_device(self) -> None:
        self.ends.to(self.device)
        self._to_draft = self._to_draft.to(self.device)
        num_draft_tokens = len(self.evaluated.draft_ids())
        rows = chosen_chunk_rows(self.objective.chunk_rows, num_draft_tokens, self.device)
        self.objective = replace(self.objective, chunk_rows=rows)
        self.validation.objective = replace(self.validation.objective, chunk_rows=rows)

    def training_step(self, batch: CacheBatch, batch_idx: int) -> Tensor:
        """Weighted mean loss of one batch; see _step_weights for what the mean is over.

        With distillation path, the loss lacks the target's entropy in steps that do not show it: that costs time and changes no gradient.

        Args:
            batch: packed samples.
            batch_idx: of the epoch.
        """
        assert self.drafter is not None
        torch.manual_seed(batch_seed(self._noise_seed, self, batch_idx))
        prepared = prepare(self.objective, batch.packed, self._to_draft, self._eos_token_ids, draw_anchors=True)
        metrics = (self.global_step + 1) % self.metrics_every == 0
        shown = metrics or batch_idx == 0
        weights, acceptance = self._step_weights(prepared), metrics and self.objective.distillation == "path"
        sums = run(self.objective, prepared, self.drafter, self.ends, weights, metrics, shown, acceptance)
        loss = sums.total.detach()
        self._finite.watch(self, loss, partial(not_finite, loss, batch, self.global_step))
        if shown:
            self.log("loss", loss, prog_bar=True, logger=False, batch_size=1)
        if metrics:
            self._log_scalars(means(sum_over_ranks(self, pool(sums)), self.objective, "train"))
        return sums.total

    def on_after_backward(self) -> None:
        """Ends the run where the loss is not finite."""
        self._finite.check()

    def _step_weights(self, prepared: PreparedBatch) -> Tensor:
        """float32 [K]: horizon weight of a step / rows of that step over all ranks, horizon weights scaled to sum to 1.

        So each step's loss is a mean over the rows of the joint batch of all ranks, however unequal their shares. The factor in front,
        the number of ranks, undoes the mean that DDP takes over gradients.
        """
        rows = sum_over_ranks(self, prepared.loss_rows.float())
        horizon = self.objective.horizon_weights(rows.device)
        return world_size(self) * (horizon / horizon.sum()) / rows.clamp(min=1.0)

    def on_validation_epoch_start(self) -> None:
        """Forgets the sums of the last validation."""
        self.validation.begin(self.device)

    def validation_step(self, batch: CacheBatch, batch_idx: int) -> None:
        """Teacher-forced cross-entropy, accuracies and acceptance along the text, whatever the training's distillation; and the drafter's
        score scale.

        Args:
            batch: packed samples.
            batch_idx: of the validation.
        """
        self.validation.add(batch.packed, self.evaluated, self.ends, self._to_draft)

    def on_validation_epoch_end(self) -> None:
        """Logs the means over all ranks."""
        if named := self.validation.pooled_means(self):
            self.log_dict(named, batch_size=1)
        if self.settle_score_scale():
            self.log("val/score_scale", self.evaluated.config.score_scale, batch_size=1)

    def settle_score_scale(self) -> bool:
        """Gives the drafter the score scale of all processes' validation batches. False where there are no such batches. Collective."""
        scale = self.validation.score_scale(self)
        if scale is not None:
            self.evaluated.config.score_scale = scale
        return scale is not None

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keeps what is no weight (score scale, seed of the noise, the drafter below an adapter), and the average among the weights."""
        checkpoint["score_scale"] = self.evaluated.config.score_scale
        checkpoint["noise_seed"] = self._noise_seed
        checkpoint["trains"] = self.starting_drafter.trains(self._base_fingerprint)
        if self.ema_decay is not None and self._copy is not None:
            self.whole_drafter()
            self._copy.save_average(checkpoint, self.trainer.is_global_zero)
            self._copy.move("cpu")

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """See on_save_checkpoint; older checkpoints have none of these.

        Args:
            checkpoint: what Lightning has read.

        Raises:
            ValueError: a checkpoint of another run.
        """
        if "trains" in checkpoint:
            self.starting_drafter.check_resumed(self._base_fingerprint, checkpoint["trains"])
        self.evaluated.config.score_scale = checkpoint.get("score_scale", 1.0)
        self._noise_seed = checkpoint.get("noise_seed", self._noise_seed)
        weights = checkpoint["state_dict"]
        average = pop_average(weights)
        check_fits(self, weights)
        if self.ema_decay is not None and self._copy is not None and average:
            self._copy.load_average(average, checkpoint, self._groups())

    def configure_optimizers(self) -> OptimizerLRSchedulerConfig:
        """AdamW, decay on matrices only; linear warm-up, then cosine."""
        optimizer = adamw(self._groups(), self.trainer.strategy, self.lr, self.betas, self.ema_decay)
        return warm_up_then_cosine(self.trainer, optimizer, self.warmup_ratio, self.min_lr_ratio)

    def _groups(self) -> list[dict[str, Any]]:
        assert self.drafter is not None
        return weight_groups(self.drafter.parameters(), self.weight_decay)

    def _log_scalars(self, means: dict[str, float]) -> None:
        # Straight to the loggers: Lightning would drop values of steps that are not on its own logging interval.
        for logger in self.loggers:
            logger.log_metrics(means, step=self.global_step)

    def _num_greedy(self) -> int:
        """The target's greedy tokens that a batch needs after each position."""
        return self.objective.num_steps + 1 if self.objective.distillation == "local" else 0

    def _data(self) -> CacheDataModule:
        data = getattr(self.trainer, "datamodule", None)
        if not isinstance(data, CacheDataModule):
            raise ValueError(
                f"DraftModule trains from a hidden-state cache, or with the target in the loop: give it CacheDataModule or "
                f"OnlineDataModule, not {type(data).__name__}"
            )
        return data


def _check_layers(layers: list[str], reader: str, cache: HiddenStateCache) -> None:
    missing = [name for name in layers if name not in cache.manifest.identity.layers]
    if missing:
        raise ValueError(
            f"training {reader} reads the layers {missing}, {cache.path} holds {list(cache.manifest.identity.layers)}; "
            "extract a cache with them (--layers)"
        )


def _check_numbers(ema_decay: float | None, metrics_every: int) -> None:
    if ema_decay is not None and not 0.0 < ema_decay < 1.0:
        raise ValueError(f"ema_decay is {ema_decay}; it must be between 0 and 1, or null for no average")
    if metrics_every < 1:
        raise ValueError(f"metrics_every is {metrics_every}; it must be at least 1")
