"""Whether a shard agrees with itself and with its manifest. A sha256 only says that a shard is what somebody wrote.

Owns what a shard's tensors must be: by name, dtype, shape and content. Tensors, offsets, ids and masks are
checked when a shard is opened, since they are a thousandth of it. States are checked when they are read. Does not know: where the bytes
come from, how samples are served.

Shape legend: n samples of a shard, T tokens, D hidden, G greedy tokens a position.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from draftsmith.data.shards.eight_bit import CODES, stored_dtype
from draftsmith.data.shards.manifest import CacheIdentity, ShardRecord
from draftsmith.json_text import parse_json

HIDDEN, SCALE = "hidden.", "scale."
TEXT = ("offsets", "input_ids", "loss_mask")
_REMEDY = "copy the cache again, or extract it again"
_DTYPE_NAMES = {
    torch.float32: "F32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.float64: "F64",
    CODES: "F8_E4M3",
}


@dataclass(frozen=True)
class TensorKind:
    """A tensor as the head of a safetensors file describes it. Example: `TensorKind("I32", (7,))`.

    Attributes:
        dtype: safetensors' name of it.
        shape: of the tensor.
    """

    dtype: str
    shape: tuple[int, ...]

    def __str__(self) -> str:
        return f"{self.dtype} {list(self.shape)}"


def layout(identity: CacheIdentity, record: ShardRecord) -> dict[str, TensorKind]:
    """List every tensor of a shard, as its manifest has it.

    Args:
        identity: of the cache.
        record: of the shard.

    Returns:
        Dtypes and shapes by name.
    """
    tokens, states = record.num_tokens, stored_dtype(identity.dtype)
    tensors = {
        "offsets": TensorKind("I64", (record.num_samples + 1,)),
        "input_ids": TensorKind("I32", (tokens,)),
        "loss_mask": TensorKind("BOOL", (tokens,)),
    }
    for layer in identity.layers:
        tensors[HIDDEN + layer] = TensorKind(_DTYPE_NAMES[states], (tokens, identity.hidden_size))
        if states == CODES:
            tensors[SCALE + layer] = TensorKind("F32", (tokens,))
    if identity.local_horizon:
        tensors["greedy_ids"] = TensorKind("I32", (tokens, identity.local_horizon))
    return tensors


def check_layout(kinds: Mapping[str, TensorKind], identity: CacheIdentity, record: ShardRecord, place: str) -> None:
    """Check that a shard has the tensors of its manifest, no other, and each of its dtype and shape.

    Args:
        kinds: the tensors that it has, by name.
        identity: of the cache.
        record: of the shard.
        place: what errors call the shard.

    Raises:
        ValueError: a tensor is missing, unknown, or of another dtype or shape.
    """
    wanted = layout(identity, record)
    if missing := sorted(wanted.keys() - kinds.keys()):
        raise ValueError(f"{place} lacks the tensors {missing}; {_REMEDY}")
    if unknown := sorted(kinds.keys() - wanted.keys()):
        raise ValueError(f"{place} has the tensors {unknown!r:.200}, which its manifest does not know; {_REMEDY}")
    for name, kind in wanted.items():
        if kinds[name] != kind:
            raise ValueError(f"{place}: {name} is {kinds[name]}, its manifest makes it {kind}; {_REMEDY}")


def check_text(
    offsets: Tensor, input_ids: Tensor, loss_mask: Tensor, record: ShardRecord, vocab_size: int | None, place: str
) -> None:
    """Check that offsets, ids and mask of one shard fit each other and its record.

    Args:
        offsets: int64 [n + 1].
        input_ids: int32 [T].
        loss_mask: bool [T].
        record: of the shard.
        vocab_size: ids must be below it; None checks only that they are ids.
        place: what errors call the shard.

    Raises:
        ValueError: they do not.
    """
    steps = offsets.diff()
    # The largest and the least too: steps between numbers of 64 bits overflow, and would then look like forward ones.
    ends = [int(offset) for offset in (offsets[0], offsets[-1], *offsets.aminmax())]
    if ends != 2 * [0, record.num_tokens] or bool((steps < 1).any()):
        backwards = (steps < 1).nonzero()
        step = f", between {ends[2]} and {ends[3]}"
        if len(backwards):
            step = f", {int(steps[backwards[0]])} tokens for sample {int(backwards[0])}"
        raise ValueError(
            f"{place}: offsets run from {int(offsets[0])} to {int(offsets[-1])}{step}; they must rise from 0 to the shard's "
            f"{record.num_tokens} tokens; {_REMEDY}"
        )
    check_ids("input_ids", input_ids, vocab_size, place)
    # A file may hold any byte where true and false are meant.
    if int(loss_mask.view(torch.uint8).max()) > 1:
        raise ValueError(f"{place}: loss_mask holds bytes other than 0 and 1; {_REMEDY}")
    if (labelled := int(loss_mask.sum())) != record.num_labelled:
        raise ValueError(
            f"{place}: loss_mask has {labelled} tokens that are trained on, num_labelled of its record is {record.num_labelled}; {_REMEDY}"
        )


def check_ids(name: str, ids: Tensor, vocab_size: int | None, place: str) -> None:
    """Check token ids.

    Args:
        name: of the tensor.
        ids: whole numbers, any shape.
        vocab_size: ids must be below it; None for a vocabulary whose size nobody knows.
        place: what errors call the shard.

    Raises:
        ValueError: an id is below 0 or not below the vocabulary's size.
    """
    if ids.numel() == 0:
        return
    least, largest = map(int, ids.aminmax())
    limit = 2**31 if vocab_size is None else vocab_size
    if least < 0 or largest >= limit:
        raise ValueError(
            f"{place}: {name} holds the token id {least if least < 0 else largest}; ids must be at least 0 and below the vocabulary of "
            f"{limit} tokens; {_REMEDY}"
        )


def sample_ids(metadata: Mapping[str, str] | None, key: str, record: ShardRecord, place: str) -> list[str]:
    """Read the samples' ids from a shard's metadata.

    Args:
        metadata: of the file.
        key: of the ids.
        record: of the shard.
        place: what errors call the shard.

    Returns:
        One id a sample.

    Raises:
        ValueError: it is not one text for each sample.
    """
    ids = parse_json((metadata or {}).get(key, "[]"), f"{place}: {key} in its metadata", _REMEDY)
    if not isinstance(ids, list) or not all(isinstance(entry, str) for entry in ids) or len(ids) != record.num_samples:
        given = f"{len(ids)} entries" if isinstance(ids, list) else type(ids).__name__
        raise ValueError(
            f"{place}: {key} in its metadata is {given}, it must be one text for each of {record.num_samples} samples; {_REMEDY}"
        )
    return ids


def check_lengths_agree(offsets: Sequence[int], lengths: np.ndarray, place: str) -> None:
    """Check that a shard's offsets give its samples as many tokens as the cache's file of lengths.

    Args:
        offsets: n + 1 numbers.
        lengths: int32 [n].
        place: what errors call the shard.

    Raises:
        ValueError: a sample has another length.
    """
    own = np.diff(offsets)
    if not np.array_equal(own, lengths):
        number = int(np.flatnonzero(own != lengths)[0])
        raise ValueError(
            f"{place}: offsets give sample {number} {own[number]} tokens, lengths.safetensors gives it {lengths[number]}; {_REMEDY}"
        )
