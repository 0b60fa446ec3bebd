"""A shared pool: text of earlier replies that every request's drafts are looked up in, where a user asks for it by name.

Owns the table of tokens and its folder. The table is fixed: decoding reads it and never adds to it, so that drafts depend on no order of
requests, and a measurement never meets its own replies. How places of it are compared and continued is in
:mod:`draftsmith.models.composed.suffixes`. Knows no drafter.

Shape legend: T slots of a pool, tokens and gaps.
"""

from __future__ import annotations

import json
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from draftsmith.models.composed.suffixes import GAP
from draftsmith.models.files.checkpoint_files import CONFIG, read_fields, read_file
from draftsmith.models.files.field_rules import COUNT, TEXT, check_fields

MODEL_TYPE = "draftsmith_pool"
MOST_SLOTS = 2**17
"""Of a pool: every cycle compares all of them with the end of every row."""
_WEIGHTS = "model.safetensors"
_TOKENS = "tokens"
_AGAIN = "make the pool again with `draftsmith data pool`"
_RULES = {"vocab_size": COUNT, "tokenizer_fingerprint": TEXT}


@dataclass(frozen=True)
class SharedPool:
    """Texts one behind the other, the newest last.

    Attributes:
        tokens_T: int64; a gap is behind each text, also behind the last one.
        vocab_size: of the target.
        tokenizer_fingerprint: of the tokenizer; empty if unknown.
    """

    tokens_T: Tensor
    vocab_size: int
    tokenizer_fingerprint: str = ""

    @classmethod
    def of(
        cls,
        texts: Iterable[Sequence[int]],
        vocab_size: int,
        num_slots: int = MOST_SLOTS,
        tokenizer_fingerprint: str = "",
    ) -> SharedPool:
        """Make a pool of the newest texts.

        Args:
            texts: token ids, the newest text last.
            vocab_size: of the target.
            num_slots: at most so many tokens are kept, of which a gap behind each text is one; the oldest are left out.
            tokenizer_fingerprint: of the tokenizer; empty if unknown.

        Returns:
            The pool, on the CPU.

        Raises:
            ValueError: a number of slots out of range, no text, or a token that the vocabulary does not have.
        """
        check_num_slots(num_slots)
        slots = deque((slot for text in texts if text for slot in (*text, GAP)), maxlen=num_slots)
        pool = cls(torch.tensor(list(slots), dtype=torch.int64), vocab_size, tokenizer_fingerprint)
        if fault := _fault(pool):
            raise ValueError(f"the texts of a shared pool have {fault}; give replies of this target")
        return pool

    @property
    def num_tokens(self) -> int:
        """Tokens without the gaps."""
        return int((self.tokens_T >= 0).sum())

    def save(self, folder: Path) -> None:
        """Write the pool as ``config.json`` and safetensors into a folder that is there."""
        fields = {
            "model_type": MODEL_TYPE,
            "vocab_size": self.vocab_size,
            "tokenizer_fingerprint": self.tokenizer_fingerprint,
        }
        (folder / CONFIG).write_text(json.dumps(fields, indent=2) + "\n", encoding="utf-8")
        save_file({_TOKENS: self.tokens_T.contiguous()}, folder / _WEIGHTS)


def check_num_slots(num_slots: int) -> None:
    """Check how many tokens a pool may take, gaps included.

    Args:
        num_slots: that are asked for.

    Raises:
        ValueError: out of range.
    """
    if not 2 <= num_slots <= MOST_SLOTS:
        raise ValueError(f"a shared pool of {num_slots} tokens is asked for; it takes from 2 to {MOST_SLOTS}")


def load_pool(folder: Path) -> SharedPool:
    """Read a pool that :meth:`SharedPool.save` wrote.

    Args:
        folder: where it lies.

    Returns:
        The pool, on the CPU.

    Raises:
        ValueError: no such folder, another kind of model, a file that is missing or cut off, or tokens that break a rule.
    """
    if not (folder / CONFIG).is_file() or read_fields(folder).get("model_type") != MODEL_TYPE:
        raise ValueError(f"{folder} holds no shared pool; give what `draftsmith data pool` wrote")
    fields = read_fields(folder)
    check_fields(fields, _RULES, str(folder / CONFIG), "make the pool again", required=("vocab_size",))
    path = folder / _WEIGHTS
    tokens_T = read_file(path, _AGAIN).get(_TOKENS, torch.zeros(0))
    pool = SharedPool(tokens_T, fields["vocab_size"], fields.get("tokenizer_fingerprint", ""))
    if fault := _fault(pool):
        raise ValueError(f"{path} has {fault}; {_AGAIN}")
    return pool


def _fault(pool: SharedPool) -> str:
    """What is wrong with a pool's tokens; empty where nothing is."""
    tokens_T = pool.tokens_T
    if tokens_T.dim() != 1 or tokens_T.dtype != torch.int64:
        return f"no line of int64 tokens, but {tokens_T.dtype} of shape {tuple(tokens_T.shape)}"
    if not bool((tokens_T >= 0).any()):
        return "no token"
    if len(tokens_T) > MOST_SLOTS:
        return f"{len(tokens_T)} tokens, more than {MOST_SLOTS}"
    if int(tokens_T[-1]) != GAP:
        return "no gap behind its last text"
    low, high = int(tokens_T.min()), int(tokens_T.max())
    if low < GAP or high >= pool.vocab_size:
        wrong = low if low < GAP else high
        return f"the token {wrong}, which a vocabulary of {pool.vocab_size} does not have"
    return ""
