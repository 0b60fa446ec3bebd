"""Distilling an ordinary draft LM towards a frozen target (DistillSpec, arXiv:2310.08461).

Owns: the settings, the step (texts, both models' states, divergence), the mean over ranks, the optimiser and its schedule, what
validation measures. Does not know: where rows come from, how divergences are computed, how models are loaded, files of a run. Real
decoding is a callback's business.

The draft LM learns the target's distribution at every position of a reply. On-policy rows are replies that it has just sampled
itself, so it learns on its own text. The other rows are the target's own replies. No gradient goes through the sampling.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Literal

import pytorch_lightning as pl
import torch
from pytorch_lightning.utilities.types import OptimizerLRSchedulerConfig
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from draftsmith.decode.engine import Engine
from draftsmith.decode.model_settings import for_target
from draftsmith.decode.sampling import GenerationSettings
from draftsmith.models.files.device_and_dtype import AUTO, resolved_dtype
from draftsmith.models.files.loading import load_tokenizer
from draftsmith.models.target.target import Target
from draftsmith.train.batches.labelled_text import LabelledText
from draftsmith.train.batches.resumed import check_same
from draftsmith.train.draft_lm.data import DistilDataModule, check_counts
from draftsmith.train.draft_lm.held_out_replies import HeldOutReplies
from draftsmith.train.draft_lm.losses import DivergenceSums
from draftsmith.train.draft_lm.padded_texts import PaddedTexts, pad_texts
from draftsmith.train.draft_lm.reply_sums import reply_sums
from draftsmith.train.draft_lm.student import Student
from draftsmith.train.draft_lm.target_choice import TargetChoice
from draftsmith.train.draft_lm.texts import DistilText, TextBatch
from draftsmith.train.drafter.starting_drafter import LoraSettings
from draftsmith.train.losses.chunk_rows import chosen_chunk_rows
from draftsmith.train.losses.divergences import DivergenceLoss, DivergenceName
from draftsmith.train.run.checkpoints import check_fits
from draftsmith.train.run.collectives import sum_over_ranks, world_size
from draftsmith.train.run.schedule import adamw, check_ratios, warm_up_then_cosine, weight_groups
from draftsmith.train.run.strategies import refuse_dividing
from draftsmith.train.run.whole_tensors import PRECISIONS

ACCEPTANCE = "val/acceptance"
Dtype = Literal["float32", "bfloat16", "float16"]


class DraftLMModule(pl.LightningModule):
    """A draft LM in training.

    Every process holds the whole draft LM, in `dtype`. The target, in `target_dtype`, is frozen and in no checkpoint.

    Args:
        target: the frozen target: a model directory, a hub id, or `embedded:target`.
        draft_lm: the draft LM to start from, with the target's tokenizer: a model directory, a hub id, or `embedded:draft_lm`.
        divergence: the loss: `forward_kl`, `reverse_kl`, `jsd`, `total_variation` (which is 1 - acceptance), `l1` (twice that),
            `negative_log_acceptance`, `lk_hybrid` (which begins as forward KL and ends as total variation), or `cross_entropy`, plain
            fine-tuning on the target's replies (the data's on_policy must then be 0).
        beta: with `jsd`, where between the two: near 0 it is like forward KL, near 1 like reverse KL.
        max_new_tokens: most tokens of a sampled reply.
        temperature: of the sampling; 0 is greedy.
        lora: train a LoRA adapter of this shape, by default on every linear layer but the output head; null trains all weights.
        lr: peak learning rate.
        betas: AdamW's decay rates of its two running averages.
        weight_decay: AdamW's, on matrices only.
        warmup_ratio: share of all steps over which the rate rises linearly.
        min_lr_ratio: the rate falls on a cosine to this share of its peak.
        chunk_rows: rows of logits of both models in memory at a time; null chooses by the vocabulary, and on CUDA by the free memory.
        sampling_rows: rows sampled together; null takes a whole batch.
        dtype: of the draft LM's weights; `auto` is float32 where they are trained, and with `lora`, which freezes them, the checkpoint's
            own on CUDA and float32 elsewhere. To train all weights in bf16, set trainer.precision to bf16-mixed instead.
        target_dtype: of the target's weights; `auto` is its checkpoint's own on CUDA, float32 elsewhere.
        revision: of the target on the hub.
        adapter: a PEFT adapter on top of the target.
        trust_remote_code: run Python files that come with the target; read them first.
        context: most tokens that the target reads; null takes it from its config, as serving engines derive it.
        target_sharding: `none`: every process holds the whole target; `fsdp2`: each process holds a part of every weight.
        device_map: accelerate's placement of a target too large for one device, such as auto; with one process only.
        quantization: `8bit` or `4bit` weights for the target.
        seed: of the sampling; the noise depends on this seed, the epoch and the row.
        num_layers: keep only so many layers of `draft_lm`, the first ones, with its embedding, final norm and head; null keeps all. So a
            target's own first layers become its draft LM: name the target as `draft_lm` too.

    Raises:
        ValueError: settings out of range; in setup(), models that do not fit together, or a strategy that divides the draft LM; in
            training, a loss that is not finite.
    """

    trains_in_bf16 = True  # where nobody sets the precision and the device can

    def __init__(
        self,
        target: str,
        draft_lm: str,
        divergence: DivergenceName = "forward_kl",
        beta: float = 0.5,
        max_new_tokens: int = 128,
        temperature: float = 1.0,
        lora: LoraSettings | None = None,
        lr: float = 1e-4,
        betas: tuple[float, float] = (0.9, 0.98),
        weight_decay: float = 0.0,
        warmup_ratio: float = 0.05,
        min_lr_ratio: float = 0.0,
        chunk_rows: int | None = None,
        sampling_rows: int | None = None,
        dtype: Literal["auto"] | Dtype = "auto",
        target_dtype: Literal["auto"] | Dtype = "auto",
        revision: str | None = None,
        adapter: str | None = None,
        trust_remote_code: bool = False,
        context: int | None = None,
        target_sharding: Literal["none", "fsdp2"] = "none",
        device_map: str | None = None,
        quantization: str | None = None,
        seed: int = 0,
        num_layers: int | None = None,
    ) -> None:
        super().__init__()
        check_ratios(warmup_ratio=warmup_ratio, min_lr_ratio=min_lr_ratio)
        check_counts(chunk_rows=chunk_rows, sampling_rows=sampling_rows, num_layers=num_layers)
        if lora is not None:
            _check_lora(lora, num_layers)
        self.divergence = DivergenceLoss(divergence, beta)
        self.sampling = GenerationSettings(max_new_tokens=max_new_tokens, temperature=temperature, seed=seed)
        self.target_choice = TargetChoice(
            target,
            str(target_dtype),
            revision,
            adapter,
            trust_remote_code,
            context,
            target_sharding,
            device_map,
            quantization,
        )
        self.draft_lm = draft_lm
        self.lora, self.num_layers = lora, num_layers
        self.chunk_rows, self.sampling_rows = chunk_rows, sampling_rows
        self.lr, self.betas, self.weight_decay = lr, betas, weight_decay
        self.warmup_ratio, self.min_lr_ratio = warmup_ratio, min_lr_ratio
        self.dtype_name = str(dtype)
        self.lm: nn.Module | None = None
        # In lists, so that none of it is a parameter or part of a checkpoint.
        self._target: list[Target] = []
        self._student: list[Student] = []
        self._tokenizer: list[PreTrainedTokenizerBase] = []
        self.held_out_replies = HeldOutReplies()
        self._val_sums = torch.zeros(4)

    @property
    def target(self) -> Target:
        """The frozen target.

        Raises:
            ValueError: setup() has not run.
        """
        return _first(self._target)

    @property
    def student(self) -> Student:
        """The draft LM.

        Raises:
            ValueError: setup() has not run.
        """
        return _first(self._student)

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The tokenizer of both models.

        Raises:
            ValueError: setup() has not run.
        """
        return _first(self._tokenizer)

    @property
    def eos_token_ids(self) -> tuple[int, ...]:
        """What ends the target's replies."""
        return self.target.eos_token_ids

    def settings(self) -> dict[str, Any]:
        """Every setting of the run that concerns the draft LM, for provenance."""
        names = (
            "draft_lm",
            "num_layers",
            "divergence",
            "sampling",
            "lora",
            "lr",
            "betas",
            "weight_decay",
            "warmup_ratio",
            "min_lr_ratio",
        )
        return {**self.target_choice.settings(), **{name: getattr(self, name) for name in names}}

    def setup(self, stage: str) -> None:
        """Loads both models, has the data read with their tokenizer and context.

        Raises:
            ValueError: settings, strategy or precision that do not fit a draft LM; models that do not fit together.
        """
        data = self.data()
        if self.divergence.name == "cross_entropy" and data.on_policy > 0:
            raise ValueError(
                f"cross_entropy on the draft LM's own samples (on_policy {data.on_policy}) would teach it what it does anyway; set the "
                "data's on_policy to 0, or choose a divergence"
            )
        refuse_dividing(self.trainer.strategy, "the draft LM", "it must be whole to sample")
        if self.trainer.precision not in PRECISIONS:
            raise ValueError(
                f"trainer.precision is {self.trainer.precision}, which would cast all of the draft LM, its rotary frequencies and an "
                f"adapter included; use {' or '.join(PRECISIONS)} (and dtype bfloat16 for weights that are to lie in bf16)"
            )
        if self.lm is None:
            self._load()
        contexts = [self.target.max_positions, self.student.as_target().max_positions]
        context = min((length for length in contexts if length is not None), default=None)
        data.read(self.tokenizer, context, self.eos_token_ids, self.target.ends.vocab_size)

    def labelled_text(self) -> LabelledText:
        """What this run learns from."""
        return self.data().labelled_text(self.target.ends.vocab_size)

    def _load(self) -> None:
        strategy = self.trainer.strategy
        self.target_choice = choice = self.target_choice.resolved(strategy)
        self.dtype_name = self._resolved_own_dtype(str(strategy.root_device))
        target = choice.load(strategy, self.trainer.world_size)
        tokenizer = load_tokenizer(choice.name, choice.revision, choice.trust_remote_code)
        student = Student.load(self.draft_lm, self.dtype_name, target, tokenizer, self.lora, self.num_layers)
        # It stays in evaluation mode on purpose: with dropout, what is trained would not be what samples and drafts.
        self._target, self._student, self._tokenizer = [target], [student], [tokenizer]
        self.lm = student.lm

    def _resolved_own_dtype(self, device: str) -> str:
        """What `dtype` means: weights that are trained stay in float32 unless the user names another."""
        if self.dtype_name == AUTO and self.lora is None:
            return "float32"
        trusted = self.target_choice.trust_remote_code
        return resolved_dtype(self.dtype_name, self.draft_lm, device, trust_remote_code=trusted)

    def on_fit_start(self) -> None:
        """Brings what Lightning does not manage to the run's device."""
        self._to_device()

    def on_validation_start(self) -> None:
        """As on_fit_start, for a run that only validates."""
        self._to_device()

    def _to_device(self) -> None:
        if self.target_choice.may_move:
            self.target.to(self.device)
        # Of both models' logits.
        vocabularies = self.student.as_target().ends.vocab_size + self.target.ends.vocab_size
        self.chunk_rows = chosen_chunk_rows(self.chunk_rows, vocabularies, self.device)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keeps the target's replies to held-out prompts. With LoRA leaves out the draft LM below the adapter, which its own directory
        holds.

        Args:
            checkpoint: what Lightning is about to write.
        """
        checkpoint["draft_lm"] = self.student.fingerprint
        checkpoint["lora"] = self.lora is not None
        checkpoint["val_replies"] = self.held_out_replies.saved(self._answering())
        for name in self._frozen():
            del checkpoint["state_dict"][name]

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Puts back what on_save_checkpoint left out, and the target's replies if it would give the same ones now.

        Args:
            checkpoint: what Lightning has read.

        Raises:
            ValueError: a checkpoint of another module or another draft LM, or one that trained all weights where this run trains an
                adapter.
        """
        own = {"draft_lm": self.student.fingerprint, "lora": self.lora is not None}
        for name in own:
            if name not in checkpoint:
                raise ValueError(
                    f"the checkpoint does not say its {name}, so no DraftLMModule has written it; give the checkpoint of such a run, or "
                    "start a new run without --ckpt_path"
                )
        check_same(own, checkpoint, "resume with the draft_lm and lora of that run")
        checkpoint["state_dict"].update(self._frozen())
        check_fits(self, checkpoint["state_dict"])
        self.held_out_replies.restore(checkpoint.get("val_replies", {}), self._answering())

    def _frozen(self) -> dict[str, Tensor]:
        """What of the draft LM's state is not trained, by its name in a checkpoint; nothing where all weights are."""
        if self.lora is None:
            return {}
        state = self.student.lm.state_dict(keep_vars=True)
        return {f"lm.{name}": value.detach() for name, value in state.items() if not value.requires_grad}

    def training_step(self, batch: TextBatch, batch_idx: int) -> Tensor:
        """Mean divergence over the reply tokens of all ranks together.

        Args:
            batch: rows.
            batch_idx: of the epoch.

        Raises:
            ValueError: the loss is not finite.
        """
        texts = self.texts_of(batch, self.trainer.current_epoch)
        padded = pad_texts(texts, self.device)
        rows = sum_over_ranks(self, torch.tensor(float(len(padded.labels_R)), device=self.device))
        # Replies that the draft LM has just sampled may hold nothing of what is trained on.
        divisor = rows.clamp(min=1.0)
        # The number of ranks undoes the mean that DDP takes over gradients.
        sums = self._sums(padded, world_size(self) / divisor, self.divergence.name != "cross_entropy")
        loss, accepted = sum_over_ranks(self, torch.stack([sums.loss, sums.acceptance])) / divisor
        # Judged by the joint loss, so that all processes stop together: one alone would leave the others waiting for its gradients.
        if not bool(torch.isfinite(loss)):
            raise ValueError(
                f"the loss is {loss.item()} at step {self.global_step} ({sums.loss.item()} on this process, rows "
                f"{[text.number for text in texts][:8]}); lower lr or set trainer.gradient_clip_val; a target that gives tokens no "
                "probability at all needs another divergence than reverse_kl"
            )
        self.log("train/loss", loss, prog_bar=True, batch_size=1)
        if self.divergence.name != "cross_entropy":
            self.log("train/acceptance", accepted, prog_bar=True, batch_size=1)
        self.log("train/reply_tokens", rows, batch_size=1)
        return sums.total

    def texts_of(self, batch: TextBatch, epoch: int) -> list[DistilText]:
        """The rows of a batch, on-policy ones with a reply that the draft LM samples now.

        The noise of a row depends on the seed, the epoch and the row, not on its batch, its rank or earlier draws.

        Args:
            batch: rows.
            epoch: its number.
        """
        data = self.data()
        asked = [text for text in batch.texts if data.is_on_policy(text.number, epoch)]
        if not asked:
            return batch.texts
        requests = [epoch * len(data.store) + text.number for text in asked]
        prompts = [text.prompt_ids for text in asked]
        settings = replace(self.sampling, eos_token_ids=self.eos_token_ids)
        replies = self.student.sample(prompts, settings, requests, self.sampling_rows or len(asked))
        sampled = {text.number: data.answered(text, reply) for text, reply in zip(asked, replies, strict=True)}
        return [sampled.get(text.number, text) for text in batch.texts]

    def validation_step(self, batch: TextBatch, batch_idx: int) -> None:
        """Divergence, acceptance and agreement along the target's own replies to held-out prompts."""
        padded = pad_texts(self._with_target_replies(batch.texts), self.device)
        with torch.no_grad():
            sums = self._sums(padded, 1.0, True)
        rows = torch.tensor(float(len(padded.labels_R)), device=self.device)
        self._val_sums += torch.stack([sums.loss, sums.acceptance, sums.agreed, rows])

    def on_validation_epoch_start(self) -> None:
        """Forgets the sums of the last validation."""
        self._val_sums = torch.zeros(4, device=self.device)
        if self.target_choice.is_sharded:  # answered by all together, whoever needs which
            data = self.data()
            for start in range(0, len(data.val_rows), data.batch_size):
                rows = data.val_rows[start : start + data.batch_size]
                self._with_target_replies([data.store.text(number) for number in rows])

    def on_validation_epoch_end(self) -> None:
        """Logs the means over all ranks."""
        self.held_out_replies.share(self)
        loss, accepted, agreed, rows = sum_over_ranks(self, self._val_sums).tolist()
        if rows:
            means = {"val/loss": loss / rows, ACCEPTANCE: accepted / rows, "val/top1": agreed / rows}
            self.log_dict(means, prog_bar=True, batch_size=1)

    def _with_target_replies(self, texts: list[DistilText]) -> list[DistilText]:
        return self.held_out_replies.complete(texts, self._answer, self.data().answered)

    def _answer(self, prompts: list[list[int]]) -> list[list[int]]:
        """The target's greedy replies. The draft LM drafts for it, which changes none of them."""
        settings = GenerationSettings(self.sampling.max_new_tokens, eos_token_ids=self.eos_token_ids)
        engine = Engine(self.target, self.student.drafter())
        with torch.autocast(self.device.type, enabled=False):  # the decoder casts nothing on the way
            generations = engine.generate(prompts, for_target(settings, self.target))
        return [list(generation.token_ids) for generation in generations]

    def _answering(self) -> dict[str, Any]:
        """What the target's greedy replies depend on, beside the prompts."""
        return {
            "target": self.target.fingerprint,
            "target_dtype": self.target_choice.dtype,
            "quantization": self.target_choice.quantization,
            "max_new_tokens": self.sampling.max_new_tokens,
        }

    def _sums(self, padded: PaddedTexts, row_weight: Tensor | float, with_target: bool) -> DivergenceSums:
        target = self.target if with_target else None
        return reply_sums(self.divergence, padded, self.student, target, row_weight, self.chunk_rows)

    def configure_optimizers(self) -> OptimizerLRSchedulerConfig:
        """AdamW, decay on matrices only; linear warm-up, then cosine."""
        groups = weight_groups(self.student.lm.parameters(), self.weight_decay)
        optimizer = adamw(groups, self.trainer.strategy, self.lr, self.betas)
        return warm_up_then_cosine(self.trainer, optimizer, self.warmup_ratio, self.min_lr_ratio)

    def data(self) -> DistilDataModule:
        """The run's rows.

        Raises:
            ValueError: another data module.
        """
        data = getattr(self.trainer, "datamodule", None)
        if not isinstance(data, DistilDataModule):
            raise ValueError(
                f"DraftLMModule trains from prompts and replies: give it DistilDataModule, not {type(data).__name__}"
            )
        return data


def _first(loaded: list[Any]) -> Any:
    if not loaded:
        raise ValueError("the module is not set up; call setup() first")
    return loaded[0]


def _check_lora(lora: LoraSettings, num_layers: int | None) -> None:
    """Raise where an adapter cannot be trained as the draft LM will run."""
    if lora.dropout > 0:
        raise ValueError(
            f"lora dropout is {lora.dropout}, but sampling and drafting use no dropout, and training must match them; set it to 0"
        )
    if num_layers is not None:
        raise ValueError(
            f"num_layers is {num_layers}, and an adapter needs a base on disk with as many layers as it adapts; set lora to null, or "
            "num_layers to null"
        )
