"""Distilling an ordinary draft LM towards a frozen target (DistillSpec, arXiv:2310.08461).

Owns: the settings, the step (texts, both models' states, divergence), the mean over ranks, the optimiser and its schedule, what
validation measures. Does not know: where rows come from, how divergences are computed, how the draft LM is loaded, real decoding (a
callback's business), files of a run.

The draft LM learns the target's distribution at every position of a reply. On-policy rows are replies that it sampled itself a moment
ago, so that it learns where it really goes; the others are the target's own replies. What is minimised or measured does not reach
through the sampling.

Shape legend: B batch rows, T positions, R rows of the loss (positions whose next token belongs to a reply), D and E hidden sizes of draft
LM and target.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import pytorch_lightning as pl
import torch
from pytorch_lightning.utilities.types import OptimizerLRSchedulerConfig
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from draftsmith.data.cache.features import prompt_lengths
from draftsmith.decode.engine import Engine
from draftsmith.decode.model_settings import for_target
from draftsmith.decode.sampling import GenerationSettings
from draftsmith.models.files.device_and_dtype import AUTO, resolved_dtype
from draftsmith.models.files.loading import load_tokenizer
from draftsmith.models.target.sharding import load_sharded, sharded_over
from draftsmith.models.target.target import Target
from draftsmith.train.batches.labelled_text import LabelledText
from draftsmith.train.draft_lm.data import DistilDataModule, Text, TextBatch
from draftsmith.train.draft_lm.losses import Divergence, DivergenceName, DivergenceSums, divergence_sums
from draftsmith.train.draft_lm.student import Student
from draftsmith.train.drafter.starting_drafter import LoraSettings
from draftsmith.train.run.checkpoints import check_fits
from draftsmith.train.run.collectives import sum_over_ranks, world_size
from draftsmith.train.run.schedule import check_ratios, warm_up_then_cosine, weight_groups
from draftsmith.train.run.strategies import refuse_dividing
from draftsmith.train.run.whole_tensors import PRECISIONS

ACCEPTANCE = "val/acceptance"
Dtype = Literal["float32", "bfloat16", "float16"]


@dataclass(frozen=True)
class Laid:
    """Texts side by side: ids_BT int64, padded on the right; keep_mask_BT bool, positions whose next token belongs to a reply;
    labels_R int64, those next tokens, row by row."""

    ids_BT: Tensor
    keep_mask_BT: Tensor
    labels_R: Tensor


def lay_out(texts: Sequence[Text], device: torch.device | str = "cpu") -> Laid:
    """The one place that shifts: the state at t meets the token at t + 1.

    Worked example: the prompt 5 6 with the reply 7 8 and the prompt 9 with the reply 4 give the ids (5 6 7 8), (9 4 0 0), the mask
    (0 1 1 0), (1 0 0 0) and the labels 7 8 4. Padding is behind every token, so causality alone keeps it out of sight.
    """
    longest = max(len(text.ids) for text in texts)
    ids_BT = torch.zeros(len(texts), longest, dtype=torch.int64)
    labelled_BT = torch.zeros(len(texts), longest, dtype=torch.bool)
    for row, text in enumerate(texts):
        ids_BT[row, : len(text.ids)] = torch.tensor(text.ids)
        labelled_BT[row, : len(text.ids)] = torch.tensor(text.labelled)
    keep_mask_BT = torch.cat([labelled_BT[:, 1:], torch.zeros(len(texts), 1, dtype=torch.bool)], dim=1)
    labels_R = ids_BT.roll(-1, dims=1)[keep_mask_BT]
    return Laid(ids_BT.to(device), keep_mask_BT.to(device), labels_R.to(device))


class DraftLMModule(pl.LightningModule):
    """A draft LM in training.

    Every process holds the whole draft LM, in `dtype`. The target, in `target_dtype`, is frozen and in no checkpoint.

    Args:
        target: the frozen target: a model directory, a hub id, or `embedded:target`.
        draft_lm: the draft LM to start from, with the target's tokenizer: a model directory, a hub id, or `embedded:draft_lm`.
        divergence: the loss: `forward_kl`, `reverse_kl`, `jsd`, `total_variation` (which is 1 - acceptance), or
            `cross_entropy`, plain fine-tuning on the target's replies (the data's on_policy must then be 0).
        beta: of `jsd`.
        max_new_tokens: of a sampled reply.
        temperature: of the sampling; 0 is greedy.
        lora: train a LoRA adapter of this shape, by default on every linear layer but the output head; null trains all weights.
        lr: peak learning rate.
        betas: AdamW's.
        weight_decay: AdamW's, on matrices only.
        warmup_ratio: share of all steps over which the rate rises linearly.
        min_lr_ratio: the rate falls on a cosine to this share of its peak.
        chunk_rows: rows of logits of both models in memory at a time; null chooses.
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

    Raises ValueError for settings out of range; in setup() for models that do not fit together, or a strategy that divides the
    draft LM; in training for a loss that is not finite.
    """

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
    ) -> None:
        super().__init__()
        check_ratios(warmup_ratio=warmup_ratio, min_lr_ratio=min_lr_ratio)
        for name, count in {"chunk_rows": chunk_rows, "sampling_rows": sampling_rows}.items():
            if count is not None and count < 1:
                raise ValueError(f"{name} is {count}; it must be at least 1, or null")
        if target_sharding != "none" and (adapter or device_map or quantization):
            raise ValueError(
                f"target_sharding {target_sharding!r} places the target's weights itself and does not change them; drop adapter, "
                "device_map and quantization, or set target_sharding to none"
            )
        if lora is not None and lora.dropout > 0:
            raise ValueError(
                f"lora dropout is {lora.dropout}, but sampling and drafting use no dropout, and training must match them; set it to 0"
            )
        self.divergence = Divergence(divergence, beta)
        self.sampling = GenerationSettings(max_new_tokens=max_new_tokens, temperature=temperature, seed=seed)
        self.target_name, self.draft_lm = target, draft_lm
        self.lora, self.chunk_rows, self.sampling_rows = lora, chunk_rows, sampling_rows
        self.lr, self.betas, self.weight_decay = lr, betas, weight_decay
        self.warmup_ratio, self.min_lr_ratio = warmup_ratio, min_lr_ratio
        self.dtype_name, self.target_dtype = str(dtype), str(target_dtype)
        self.revision, self.adapter, self.context = revision, adapter, context
        self.trust_remote_code = trust_remote_code
        self.device_map, self.quantization, self.target_sharding = device_map, quantization, target_sharding
        self.lm: nn.Module | None = None
        # In lists, so that none of it is a parameter or part of a checkpoint.
        self._target: list[Target] = []
        self._student: list[Student] = []
        self._tokenizer: list[PreTrainedTokenizerBase] = []
        self._val_replies: dict[int, list[int]] = {}
        self._num_shared = 0
        self._val_sums = torch.zeros(4)

    @property
    def target(self) -> Target:
        """The frozen target. Raises ValueError before setup()."""
        return _first(self._target)

    @property
    def student(self) -> Student:
        """The draft LM. Raises ValueError before setup()."""
        return _first(self._student)

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """Of both. Raises ValueError before setup()."""
        return _first(self._tokenizer)

    @property
    def eos_token_ids(self) -> tuple[int, ...]:
        """What ends the target's replies."""
        return self.target.eos_token_ids

    def settings(self) -> dict[str, Any]:
        """Every setting of the run that concerns the draft LM, for provenance."""
        names = (
            "draft_lm",
            "divergence",
            "sampling",
            "lora",
            "lr",
            "betas",
            "weight_decay",
            "warmup_ratio",
            "min_lr_ratio",
            "target_dtype",
            "revision",
            "adapter",
            "trust_remote_code",
            "context",
            "quantization",
        )
        return {"target": self.target_name, **{name: getattr(self, name) for name in names}}

    def setup(self, stage: str) -> None:
        """Loads both models, has the data read with their tokenizer and context."""
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
        contexts = [self.target.max_positions, self.student.doors().max_positions]
        context = min((one for one in contexts if one is not None), default=None)
        data.read(self.tokenizer, context, self.eos_token_ids, self.target.ends.vocab_size)

    def labelled_text(self) -> LabelledText:
        """What this run learns from."""
        return self.data().labelled_text(self.target.ends.vocab_size)

    def _load(self) -> None:
        if self.device_map is not None and self.trainer.world_size > 1:
            raise ValueError(
                "device_map spreads one target over all devices; use it with trainer.devices 1, or leave it out"
            )
        device = str(self.trainer.strategy.root_device)
        self.target_dtype = resolved_dtype(
            self.target_dtype, self.target_name, device, self.revision, self.trust_remote_code
        )
        self.dtype_name = self._resolved_own_dtype(device)
        target = self._load_target()
        tokenizer = load_tokenizer(self.target_name, self.revision, self.trust_remote_code)
        student = Student.load(self.draft_lm, self.dtype_name, target, tokenizer, self.lora)
        # It stays in evaluation mode on purpose: with dropout, what is trained would not be what samples and drafts.
        self._target, self._student, self._tokenizer = [target], [student], [tokenizer]
        self.lm = student.lm

    def _resolved_own_dtype(self, device: str) -> str:
        """What `dtype` means: weights that are trained stay in float32 unless the user names another."""
        if self.dtype_name == AUTO and self.lora is None:
            return "float32"
        return resolved_dtype(self.dtype_name, self.draft_lm, device, trust_remote_code=self.trust_remote_code)

    def _load_target(self) -> Target:
        if self.is_sharded:
            over, device = sharded_over(self.target_sharding), self.trainer.strategy.root_device
            return load_sharded(
                self.target_name, self.target_dtype, over, device, self.revision, self.trust_remote_code, self.context
            )
        return Target.load(
            self.target_name,
            dtype=self.target_dtype,
            device_map=self.device_map,
            revision=self.revision,
            adapter=self.adapter,
            quantization=self.quantization,
            trust_remote_code=self.trust_remote_code,
            context=self.context,
        )

    @property
    def is_sharded(self) -> bool:
        """Whether processes hold the target together, so that each of its forwards is one of all of them."""
        return sharded_over(self.target_sharding).is_sharded

    def on_fit_start(self) -> None:
        """Brings what Lightning does not manage to the run's device."""
        self._to_device()

    def on_validation_start(self) -> None:
        """As on_fit_start, for a run that only validates."""
        self._to_device()

    def _to_device(self) -> None:
        if self.device_map is None and self.quantization is None and not self.is_sharded:
            self.target.to(self.device)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keeps the target's replies to held-out prompts. With LoRA leaves out the draft LM below the adapter, which its own directory
        holds; see on_load_checkpoint.
        """
        checkpoint["draft_lm"] = self.student.fingerprint
        checkpoint["lora"] = self.lora is not None
        checkpoint["val_replies"] = {"made_by": self._answering(), "replies": dict(self._val_replies)}
        for name in self._frozen():
            del checkpoint["state_dict"][name]

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Puts back what on_save_checkpoint left out, and the target's replies if it would give the same ones now.

        Raises ValueError for a checkpoint of another module or another draft LM, or one that trained all weights where this run trains an
        adapter.
        """
        own = {"draft_lm": self.student.fingerprint, "lora": self.lora is not None}
        for name, value in own.items():
            if name not in checkpoint:
                raise ValueError(
                    f"the checkpoint does not say its {name}, so no DraftLMModule has written it; give the checkpoint of such a run, or "
                    "start a new run without --ckpt_path"
                )
            if checkpoint[name] != value:
                raise ValueError(
                    f"the checkpoint was made with {name} = {checkpoint[name]!r}, this run has {value!r}; resume with the draft_lm and "
                    "lora of that run, or start a new run without --ckpt_path"
                )
        checkpoint["state_dict"].update(self._frozen())
        check_fits(self, checkpoint["state_dict"])
        kept = checkpoint.get("val_replies", {})
        if kept.get("made_by") == self._answering():
            self._val_replies = dict(kept["replies"])
            self._num_shared = len(self._val_replies)

    def _frozen(self) -> dict[str, Tensor]:
        """What of the draft LM's state is not trained, by its name in a checkpoint; nothing where all weights are."""
        if self.lora is None:
            return {}
        state = self.student.lm.state_dict(keep_vars=True)
        return {f"lm.{name}": value.detach() for name, value in state.items() if not value.requires_grad}

    def training_step(self, batch: TextBatch, batch_idx: int) -> Tensor:
        """Mean divergence over the reply tokens of all ranks together."""
        texts = self.texts_of(batch, self.trainer.current_epoch)
        laid = lay_out(texts, self.device)
        rows = sum_over_ranks(self, torch.tensor(float(len(laid.labels_R)), device=self.device))
        # The number of ranks undoes the mean that DDP takes over gradients.
        sums = self._sums(laid, world_size(self) / rows.clamp(min=1.0), self.divergence.name != "cross_entropy")
        found = sum_over_ranks(self, torch.stack([sums.loss, sums.acceptance])) / rows
        # Judged by the joint loss, so that all processes stop together: one alone would leave the others waiting for its gradients.
        if not bool(torch.isfinite(found[0])):
            raise ValueError(
                f"the loss is {found[0].item()} at step {self.global_step} ({sums.loss.item()} on this process, rows "
                f"{[text.number for text in texts][:8]}); lower lr or set trainer.gradient_clip_val; a target that gives tokens no "
                "probability at all needs another divergence than reverse_kl"
            )
        self.log("train/loss", found[0], prog_bar=True, batch_size=1)
        if self.divergence.name != "cross_entropy":
            self.log("train/acceptance", found[1], prog_bar=True, batch_size=1)
        self.log("train/reply_tokens", rows, batch_size=1)
        return sums.total

    def texts_of(self, batch: TextBatch, epoch: int) -> list[Text]:
        """The rows of a batch, on-policy ones with a reply that the draft LM samples now.

        The noise of a row is a function of the seed, the epoch and the row: not of its batch, its rank or what was drawn before.
        """
        data = self.data()
        asked = [text for text in batch.texts if data.is_on_policy(text.number, epoch)]
        if not asked:
            return batch.texts
        requests = [epoch * len(data.store) + text.number for text in asked]
        prompts = [text.ids[: text.num_prompt] for text in asked]
        settings = replace(self.sampling, eos_token_ids=self.eos_token_ids)
        replies = self.student.sample(prompts, settings, requests, self.sampling_rows or len(asked))
        sampled = {
            text.number: text.with_reply(reply, data.max_length) for text, reply in zip(asked, replies, strict=True)
        }
        return [sampled.get(text.number, text) for text in batch.texts]

    def validation_step(self, batch: TextBatch, batch_idx: int) -> None:
        """Divergence, acceptance and agreement along the target's own replies to held-out prompts."""
        laid = lay_out(self._with_target_replies(batch.texts), self.device)
        with torch.no_grad():
            sums = self._sums(laid, 1.0, True)
        rows = torch.tensor(float(len(laid.labels_R)), device=self.device)
        self._val_sums += torch.stack([sums.loss, sums.acceptance, sums.agreed, rows])

    def on_validation_epoch_start(self) -> None:
        """Forgets the sums of the last validation."""
        self._val_sums = torch.zeros(4, device=self.device)
        if self.is_sharded:  # answered by all together, whoever needs which
            data = self.data()
            for start in range(0, len(data.val_rows), data.batch_size):
                rows = data.val_rows[start : start + data.batch_size]
                self._with_target_replies([data.store.text(number) for number in rows])

    def on_validation_epoch_end(self) -> None:
        """Logs the means over all ranks."""
        self._share_replies()
        loss, accepted, agreed, rows = sum_over_ranks(self, self._val_sums).tolist()
        if rows:
            means = {"val/loss": loss / rows, ACCEPTANCE: accepted / rows, "val/top1": agreed / rows}
            self.log_dict(means, prog_bar=True, batch_size=1)

    def _with_target_replies(self, texts: list[Text]) -> list[Text]:
        """Prompts alone are answered by the target once, greedily, with the draft LM's help, which does not change the reply."""
        missing = [text for text in texts if not text.has_reply and text.number not in self._val_replies]
        max_length = self.data().max_length
        if missing:
            settings = GenerationSettings(self.sampling.max_new_tokens, eos_token_ids=self.eos_token_ids)
            settings = for_target(settings, self.target)
            engine = Engine(self.target, self.student.drafter())
            with torch.autocast(self.device.type, enabled=False):  # the decoder casts nothing on the way
                found = engine.generate([text.ids for text in missing], settings)
            for text, generation in zip(missing, found, strict=True):
                self._val_replies[text.number] = list(generation.token_ids)
        return [
            text if text.has_reply else text.with_reply(self._val_replies[text.number], max_length) for text in texts
        ]

    def _share_replies(self) -> None:
        """Gives every process the replies of all, where there are new ones: a checkpoint is the first one's."""
        new = torch.tensor(len(self._val_replies) - self._num_shared, device=self.device)
        if world_size(self) > 1 and sum_over_ranks(self, new):
            everyones: list[dict[int, list[int]]] = [{} for _ in range(world_size(self))]
            torch.distributed.all_gather_object(everyones, self._val_replies)
            self._val_replies = {number: reply for replies in everyones for number, reply in replies.items()}
        self._num_shared = len(self._val_replies)

    def _answering(self) -> dict[str, Any]:
        """What the target's greedy replies depend on, beside the prompts."""
        return {
            "target": self.target.fingerprint,
            "target_dtype": self.target_dtype,
            "quantization": self.quantization,
            "max_new_tokens": self.sampling.max_new_tokens,
        }

    def _sums(self, laid: Laid, row_weight: Tensor | float, with_target: bool) -> DivergenceSums:
        student = self.student
        # Before the draft LM, whose activations then do not lie beside what the target's forward needs.
        states_RE = self._target_states(laid) if with_target else None
        states_RD = student.states(laid.ids_BT)[laid.keep_mask_BT]
        return divergence_sums(
            self.divergence,
            states_RD,
            student.doors().ends.logits,
            student.head_parameters(),
            states_RE,
            self._target_logits if with_target else None,
            laid.labels_R,
            row_weight,
            self.chunk_rows,
        )

    def _target_states(self, laid: Laid) -> Tensor:
        """[R, E], where the target has them: it may lie on other devices, and of its states only those of the rows are kept."""
        # The state before the first reply token is the prompt's last.
        read_B = prompt_lengths(laid.keep_mask_BT.cpu().roll(1, dims=1), self.target.device)
        normed_BTE = self.target.prefix(laid.ids_BT.to(self.target.device), read=read_B).normed
        return normed_BTE[laid.keep_mask_BT.to(normed_BTE.device)]

    def _target_logits(self, states: Tensor) -> Tensor:
        return self.target.logits(states.to(self.target.ends.device)).to(self.device)

    def configure_optimizers(self) -> OptimizerLRSchedulerConfig:
        """AdamW, decay on matrices only; linear warm-up, then cosine."""
        groups = weight_groups(self.student.lm.parameters(), self.weight_decay)
        optimizer = torch.optim.AdamW(groups, lr=self.lr, betas=self.betas)
        return warm_up_then_cosine(self.trainer, optimizer, self.warmup_ratio, self.min_lr_ratio)

    def data(self) -> DistilDataModule:
        """The run's rows. Raises ValueError for another data module."""
        data = getattr(self.trainer, "datamodule", None)
        if not isinstance(data, DistilDataModule):
            raise ValueError(
                f"DraftLMModule trains from prompts and replies: give it DistilDataModule, not {type(data).__name__}"
            )
        return data


def _first(held: list[Any]) -> Any:
    if not held:
        raise ValueError("the module is not set up; call setup() first")
    return held[0]
