"""Tiny random targets and drafters, saved as a user's would be."""

from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from draftsmith.models.families.redrafter import ReDrafter
from draftsmith.models.files.fingerprint import tokenizer_fingerprint
from draftsmith.models.files.loading import load_tokenizer
from draftsmith.models.target.target import TargetEnds

TEMPLATE = (
    "{% for m in messages %}{% if m['role'] == 'assistant' %}<|assistant|>\n"
    "{% generation %}{{ m['content'] }}<|end|>{% endgeneration %}\n\n"
    "{% else %}<|{{ m['role'] }}|>\n{{ m['content'] }}\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)
SPECIAL = ["<|pad|>", "<|system|>", "<|user|>", "<|assistant|>", "<|end|>"]
EOS = SPECIAL.index("<|end|>")
CONTEXT = 256
TEXTS = [
    "Tom has three apples and buys four more apples.",
    "How many apples does Tom have now?",
    "He has seven apples.",
]


def make_tokenizer(template: str | None = TEMPLATE) -> PreTrainedTokenizerFast:
    """A byte-level BPE of 300 tokens: any text can be encoded, and now and then in more ways than one."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(TEXTS * 4, trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|end|>", pad_token="<|pad|>")
    fast.chat_template = template
    return fast


def save_target(folder: Path, seed: int = 0, template: str | None = TEMPLATE) -> Path:
    """A two-layer Llama with weights large enough that its replies vary, and its tokenizer."""
    tokenizer = make_tokenizer(template)
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=CONTEXT,
        initializer_range=0.3,
        eos_token_id=EOS,
        bos_token_id=None,
        pad_token_id=0,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
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
