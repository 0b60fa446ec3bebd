"""Tiny random targets and drafters, saved as a user's would be."""

from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from draftsmith.models.fingerprint import tokenizer_fingerprint
from draftsmith.models.redrafter import ReDrafter
from draftsmith.models.target import TargetEnds, load_tokenizer

TEMPLATE = "{% for m in messages %}<u>{{ m['content'] }}{% endfor %}{% if add_generation_prompt %}<a>{% endif %}"


def save_target(folder: Path, seed: int = 0, template: bool = True) -> Path:
    """A random two-layer Llama with a character tokenizer, saved as a user's target would be."""
    torch.manual_seed(seed)
    letters = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789 .,?"
    vocabulary = {token: place for place, token in enumerate(["<pad>", "<eos>", "<u>", "<a>", *letters])}
    inner = Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>"))
    inner.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="<pad>", eos_token="<eos>")
    tokenizer.add_special_tokens({"additional_special_tokens": ["<u>", "<a>"]})
    tokenizer.chat_template = TEMPLATE if template else None
    tokenizer.save_pretrained(folder)
    config = LlamaConfig(
        vocab_size=len(vocabulary),
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=256,
        eos_token_id=1,
        pad_token_id=0,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def save_drafter(folder: Path, target: Path, draft_ids: torch.Tensor | None = None) -> Path:
    """A drafter of random weights for a target, saved as training does."""
    torch.manual_seed(3)
    drafter = ReDrafter.for_target(
        TargetEnds.load(str(target)),
        draft_token_ids=draft_ids,
        head_init="random",
        tokenizer_fingerprint=tokenizer_fingerprint(load_tokenizer(str(target))),
    )
    drafter.save_pretrained(folder)
    return folder
