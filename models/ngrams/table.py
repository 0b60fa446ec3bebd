"""A back-off n-gram model as sorted tensors: scored and followed for many contexts at once, on any device.

Owns the lookup and the folder. An n-gram is a row; its key is the row of what it continues times V plus its last token, so one sorted
array serves all orders and no hash is needed. How the numbers are made is in :mod:`draftsmith.models.ngrams.kneser_ney`. Knows no drafter.

Shape legend: G n-grams of all orders, V vocabulary.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from draftsmith.models.files.checkpoint_files import CONFIG, read_fields, read_file
from draftsmith.models.files.field_rules import COUNT, TEXT, check_fields

MODEL_TYPE = "draftsmith_ngrams"
_WEIGHTS = "model.safetensors"
_AGAIN = "make the table again with `draftsmith data ngrams`"
_RULES = {"order": COUNT, "vocab_size": COUNT, "tokenizer_fingerprint": TEXT}


@dataclass(frozen=True)
class NgramTable:
    """The n-grams of a text with their probabilities. Context 0 is the empty one; context g + 1 is the n-gram in row g.

    Attributes:
        order: N, the longest n-gram.
        vocab_size: V.
        keys_G: int64, increasing: context * V + last token.
        log_probs_G: float32, log P(last token | the others), interpolated with all lower orders.
        backoffs_C: float32 [G + 1], log of the weight that each context leaves to the next shorter one; of the empty one, to 1 / V.
        links_C: int64 [G + 1], the context without its first token; 0 of single tokens and of the empty one.
        orders_C: int64 [G + 1], how many tokens each context has.
        tokenizer_fingerprint: of the tokenizer; empty if unknown.
    """

    order: int
    vocab_size: int
    keys_G: Tensor
    log_probs_G: Tensor
    backoffs_C: Tensor
    links_C: Tensor
    orders_C: Tensor
    tokenizer_fingerprint: str = ""

    def log_prob(self, contexts: Tensor, tokens: Tensor) -> Tensor:
        """Score tokens behind contexts.

        Args:
            contexts: int64, from 0 to G; broadcast with the tokens.
            tokens: int64 in [0, V).

        Returns:
            float32 of the common shape, natural logarithms; they sum to 1 over the vocabulary.
        """
        contexts, tokens = torch.broadcast_tensors(contexts, tokens)
        total = torch.zeros(contexts.shape, dtype=torch.float32, device=contexts.device)
        done = torch.zeros_like(contexts, dtype=torch.bool)
        for _ in range(self.order):
            row, hit = self._row(contexts, tokens)
            now = hit & ~done
            total = total + torch.where(now, self.log_probs_G[row], 0.0)
            done = done | hit
            total = total + torch.where(done, 0.0, self.backoffs_C[contexts])
            # A token that no context has known is one of V equals, behind the weight of the empty context.
            unknown = ~done & (contexts == 0)
            total = total - torch.where(unknown, self._log_vocab(total), 0.0)
            done = done | unknown
            contexts = self.links_C[contexts]
        return total

    def follow(self, contexts: Tensor, tokens: Tensor) -> Tensor:
        """Find the context behind one more token: the longest known end of both, of at most N - 1 tokens.

        Args:
            contexts: int64.
            tokens: int64, of the same shape.

        Returns:
            int64.
        """
        result, done = torch.zeros_like(contexts), torch.zeros_like(contexts, dtype=torch.bool)
        for _ in range(self.order):
            row, hit = self._row(contexts, tokens)
            following = torch.where(self.orders_C[row + 1] == self.order, self.links_C[row + 1], row + 1)
            result = torch.where(hit & ~done, following, result)
            done = done | hit | (contexts == 0)
            contexts = self.links_C[contexts]
        return result

    def context_of(self, tokens_BT: Tensor) -> Tensor:
        """The context behind some tokens.

        Args:
            tokens_BT: int64 [B, T]; a negative one empties the context.

        Returns:
            int64 [B].
        """
        contexts_B = torch.zeros_like(tokens_BT[:, 0])
        for token_B in tokens_BT.unbind(1):
            contexts_B = self.follow(contexts_B, token_B.clamp(min=0)).masked_fill(token_B < 0, 0)
        return contexts_B

    def to(self, device: torch.device | str) -> NgramTable:
        """The same table on a device."""
        names = ("keys_G", "log_probs_G", "backoffs_C", "links_C", "orders_C")
        return replace(self, **{name: getattr(self, name).to(device) for name in names})

    def save(self, folder: Path) -> None:
        """Write the table as ``config.json`` and safetensors into a folder that is there."""
        fields = {
            "order": self.order,
            "vocab_size": self.vocab_size,
            "tokenizer_fingerprint": self.tokenizer_fingerprint,
        }
        (folder / CONFIG).write_text(
            json.dumps({"model_type": MODEL_TYPE, **fields}, indent=2) + "\n", encoding="utf-8"
        )
        tensors = {
            "keys": self.keys_G,
            "log_probs": self.log_probs_G,
            "backoffs": self.backoffs_C,
            "links": self.links_C,
            "orders": self.orders_C,
        }
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / _WEIGHTS)

    def _row(self, contexts: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
        key = contexts * self.vocab_size + tokens
        row = torch.searchsorted(self.keys_G, key).clamp(max=self.keys_G.shape[0] - 1)
        return row, self.keys_G[row] == key

    def _log_vocab(self, like: Tensor) -> Tensor:
        return torch.full_like(like, float(self.vocab_size)).log()


def load_ngrams(folder: Path) -> NgramTable:
    """Read a table that :meth:`NgramTable.save` wrote.

    Args:
        folder: where it lies.

    Returns:
        The table, on the CPU.

    Raises:
        ValueError: no such folder, another kind of model, a file that is missing or cut off, or tensors that contradict each other.
    """
    if not (folder / CONFIG).is_file() or read_fields(folder).get("model_type") != MODEL_TYPE:
        raise ValueError(f"{folder} holds no n-gram table; give what `draftsmith data ngrams` wrote")
    fields = read_fields(folder)
    check_fields(fields, _RULES, str(folder / CONFIG), "make the table again", required=("order", "vocab_size"))
    tensors = read_file(folder / _WEIGHTS, _AGAIN)
    keys_G, log_probs_G, backoffs_C, links_C, orders_C = (
        tensors.get(name, torch.zeros(0)) for name in ("keys", "log_probs", "backoffs", "links", "orders")
    )
    table = NgramTable(
        fields["order"],
        fields["vocab_size"],
        keys_G,
        log_probs_G,
        backoffs_C,
        links_C,
        orders_C,
        fields.get("tokenizer_fingerprint", ""),
    )
    if fault := _fault(table):
        raise ValueError(f"{folder / _WEIGHTS} has {fault}; {_AGAIN}")
    return table


def _fault(table: NgramTable) -> str:
    """What is wrong with the tensors of a file; empty where nothing is."""
    size = table.keys_G.shape[0]
    contexts = (table.backoffs_C, table.links_C, table.orders_C)
    if size == 0 or table.log_probs_G.shape != (size,) or any(tensor.shape != (size + 1,) for tensor in contexts):
        return "tensors that are missing or of other lengths"
    if any(tensor.dtype != torch.int64 for tensor in (table.keys_G, table.links_C, table.orders_C)):
        return "keys, links or orders that are not int64"
    if not (torch.isfinite(table.log_probs_G).all() and torch.isfinite(table.backoffs_C).all()):
        return "NaN or infinity among its logarithms"
    if bool((table.keys_G.diff() <= 0).any()) or int(table.keys_G[0]) < 0:
        return "keys that do not increase"
    above = table.keys_G // table.vocab_size
    if bool((above > torch.arange(size)).any()) or bool((table.orders_C[1:] != table.orders_C[above] + 1).any()):
        return "n-grams whose contexts come behind them"
    if (
        bool((table.orders_C[table.links_C[1:]] != table.orders_C[1:] - 1).any())
        or int(table.orders_C.max()) > table.order
    ):
        return "links to contexts of another length"
    return ""
