"""Training a small Llama language model from scratch or from an earlier phase: the embedded target and draft LM.

Owns the optimiser, the schedule and the loss. Does not know the corpus. Shapes: B batch, T positions, V vocabulary.
"""

import math
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.utilities.types import OptimizerLRSchedulerConfig
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from draftsmith.models.files.end_tokens import end_tokens
from draftsmith.models.files.pretrained import read_model, read_tokenizer
from draftsmith.train.run.checkpoints import check_fits

_IGNORED = -100


class LmModule(pl.LightningModule):
    """A Llama language model under next-token cross-entropy.

    Args:
        tokenizer: directory of the tokenizer, which fixes the vocabulary.
        init_from: a model directory to start from. The sizes given here must then be its own.
        hidden_size: of the model.
        num_layers: of the model.
        num_heads: attention heads.
        num_kv_heads: key and value heads.
        intermediate_size: of the MLP.
        max_position_embeddings: most tokens of a text.
        lr: peak learning rate.
        warmup_steps: the rate rises linearly over these.
        final_lr_share: the rate then falls on a cosine to this share of its peak.
        weight_decay: AdamW's, on matrices only.
        schedule_steps: length of the schedule; null takes the run's own. A longer one means a run that stops early.

    Raises:
        ValueError: ``init_from`` has another architecture.
    """

    def __init__(
        self,
        tokenizer: Path,
        init_from: Path | None = None,
        hidden_size: int = 192,
        num_layers: int = 8,
        num_heads: int = 6,
        num_kv_heads: int = 2,
        intermediate_size: int = 480,
        max_position_embeddings: int = 512,
        lr: float = 2e-3,
        warmup_steps: int = 100,
        final_lr_share: float = 0.05,
        weight_decay: float = 0.05,
        schedule_steps: int | None = None,
    ) -> None:
        super().__init__()
        words = read_tokenizer(tokenizer)
        config = LlamaConfig(
            vocab_size=len(words),
            hidden_size=hidden_size,
            intermediate_size=intermediate_size,
            num_hidden_layers=num_layers,
            num_attention_heads=num_heads,
            num_key_value_heads=num_kv_heads,
            max_position_embeddings=max_position_embeddings,
            tie_word_embeddings=True,
            bos_token_id=None,
            eos_token_id=end_tokens(tokenizer=words)[0],
            pad_token_id=words.pad_token_id,
        )
        self.lm = LlamaForCausalLM(config) if init_from is None else _load(init_from, config)
        self._lr = lr
        self._warmup_steps = warmup_steps
        self._final_lr_share = final_lr_share
        self._weight_decay = weight_decay
        self._schedule_steps = schedule_steps

    def training_step(self, batch: dict[str, torch.Tensor], batch_idx: int) -> torch.Tensor:
        """Mean cross-entropy of the labelled tokens."""
        logits_NV, labels_N = self._predict(batch)
        loss = nn.functional.cross_entropy(logits_NV, labels_N)
        self.log("train/loss", loss, prog_bar=True)
        return loss

    def validation_step(self, batch: dict[str, torch.Tensor], batch_idx: int) -> None:
        """Logs cross-entropy and top-1 accuracy."""
        logits_NV, labels_N = self._predict(batch)
        loss = nn.functional.cross_entropy(logits_NV, labels_N)
        top1 = (logits_NV.argmax(-1) == labels_N).float().mean()
        rows = batch["input_ids"].shape[0]
        self.log("val/loss", loss, prog_bar=True, batch_size=rows)
        self.log("val/top1", top1, prog_bar=True, batch_size=rows)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Checks the weights.

        Args:
            checkpoint: what Lightning has read.

        Raises:
            ValueError: the weights of another model.
        """
        check_fits(self, checkpoint["state_dict"])

    def configure_optimizers(self) -> OptimizerLRSchedulerConfig:
        """AdamW, decay on matrices only; linear warm-up, then cosine."""
        matrices = [weight for weight in self.lm.parameters() if weight.ndim > 1]
        vectors = [weight for weight in self.lm.parameters() if weight.ndim <= 1]
        groups = [{"params": matrices, "weight_decay": self._weight_decay}, {"params": vectors, "weight_decay": 0.0}]
        optimizer = torch.optim.AdamW(groups, lr=self._lr, betas=(0.9, 0.98), fused=True)
        total = self._schedule_steps or int(self.trainer.estimated_stepping_batches)
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: self._lr_share(step, total))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def _lr_share(self, step: int, total: int) -> float:
        if step < self._warmup_steps:
            return (step + 1) / self._warmup_steps
        progress = min(1.0, (step - self._warmup_steps) / max(1, total - self._warmup_steps))
        return self._final_lr_share + (1 - self._final_lr_share) * 0.5 * (1 + math.cos(math.pi * progress))

    def _predict(self, batch: dict[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        """Logits [N, V] and labels [N] of the N labelled tokens. The one place that shifts: the state at t meets
        label t+1.

        With labels (-, -, a, b) over four positions, the logits are those of positions 1 and 2, the labels a and b.
        """
        # Rows are padded on the right, so causality alone keeps padding out of sight and no mask is needed.
        hidden_BTD = self.lm.model(input_ids=batch["input_ids"], use_cache=False).last_hidden_state[:, :-1]
        labels_BT = batch["labels"][:, 1:]
        keep_mask_BT = labels_BT != _IGNORED
        return self.lm.lm_head(hidden_BTD[keep_mask_BT]), labels_BT[keep_mask_BT]


def _load(directory: Path, config: LlamaConfig) -> LlamaForCausalLM:
    lm: LlamaForCausalLM = read_model(LlamaForCausalLM, directory, dtype=torch.float32)
    for name in ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"):
        loaded, wanted = getattr(lm.config, name), getattr(config, name)
        if loaded != wanted:
            raise ValueError(f"init_from {directory}: {name} is {loaded}, the run says {wanted}; make them equal")
    return lm
