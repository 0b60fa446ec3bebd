"""What tests of distilling a draft LM share: a tiny draft LM, the target's replies, a module, a data module and a YAML."""

import json
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from training import VOCAB, make_trainer
from transformers import LlamaConfig, LlamaForCausalLM

from draftsmith.decode.engine import Engine
from draftsmith.decode.sampling import GenerationSettings
from draftsmith.models.files.loading import load_tokenizer
from draftsmith.models.target.target import Target
from draftsmith.train.draft_lm.data import DistilDataModule
from draftsmith.train.draft_lm.module import DraftLMModule

REPLY = 8


def save_draft_lm(folder: Path, target: Path, vocab_size: int = VOCAB, seed: int = 5) -> Path:
    """A Llama of one layer with random weights and the target's tokenizer."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=96,
        bos_token_id=None,
        eos_token_id=1,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    load_tokenizer(str(target)).save_pretrained(folder)
    return folder


def save_replies(path: Path, target: Target, count: int = 20, temperature: float = 1.0) -> Path:
    """The target's own replies to random prompts of two to four tokens."""
    generator = torch.Generator().manual_seed(0)
    prompts = [torch.randint(2, VOCAB, (2 + row % 3,), generator=generator).tolist() for row in range(count)]
    settings = GenerationSettings(REPLY, temperature=temperature, eos_token_ids=target.eos_token_ids)
    found = Engine(target).generate(prompts, settings)
    rows = [
        {"id": f"r{row}", "prompt_ids": prompt, "reply_ids": reply.token_ids, "split": "train"}
        for row, (prompt, reply) in enumerate(zip(prompts, found, strict=True))
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def distil_module(target: Path, draft_lm: Path, **settings: Any) -> DraftLMModule:
    """A module with small numbers."""
    chosen: dict[str, Any] = {"max_new_tokens": REPLY, "lr": 1e-2, "warmup_ratio": 0.0, "min_lr_ratio": 1.0}
    return DraftLMModule(str(target), str(draft_lm), **(chosen | settings))


def distil_data(replies: Path, **settings: Any) -> DistilDataModule:
    """Rows with small numbers."""
    return DistilDataModule(replies, **({"batch_size": 4, "val_fraction": 0.2} | settings))


def fit(root: Path, module: DraftLMModule, data: DistilDataModule, **settings: Any) -> pl.Trainer:
    """A run of one epoch by default."""
    pl.seed_everything(0, verbose=False)
    trainer = make_trainer(root, **settings)
    trainer.fit(module, data)
    return trainer
