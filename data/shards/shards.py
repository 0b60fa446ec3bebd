"""One shard of a hidden-state cache: several samples end to end in a safetensors file.

A shard of n samples and T tokens in all has these tensors:

- `offsets` int64 [n + 1]: sample i is `offsets[i]:offsets[i + 1]`
- `input_ids` int32 [T], `loss_mask` bool [T]
- `hidden.<layer>` [T, D] for each layer; states of eight bits are float8_e4m3fn, with `scale.<layer>` float32 [T] beside them
- `greedy_ids` int32 [T, G], where greedy continuations were asked for

Owns: this layout. Does not know: how numbers become eight bits (`eight_bit.py`), what a shard must be (`shard_checks.py`),
targets, training.
"""

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from draftsmith.data.shards.eight_bit import CODES, EightBitStates
from draftsmith.data.shards.finite import check_finite
from draftsmith.data.shards.manifest import CacheIdentity, ShardRecord
from draftsmith.data.shards.shard_checks import (
    HIDDEN,
    SCALE,
    TEXT,
    TensorKind,
    check_ids,
    check_layout,
    check_text,
    sample_ids,
)
from draftsmith.files import atomic_write, sha256_file

# A single metadata entry: with several, safetensors writes them in an order that changes from run to run.
_IDS = "ids"


@dataclass(frozen=True)
class CachedSample:
    """One sample as it comes out of a cache.

    Attributes:
        id: the sample's.
        input_ids: int64 [T].
        loss_mask: bool [T], True where a token is trained on.
        hidden: layer name -> [T, D] in the stored dtype, a view of the file and not a copy. States of eight bits come as bfloat16, made at
            each access. From a cache, `hidden[layer]` raises a ValueError for states that are not finite. It does so only then, since
            layers that nobody asks for are never read from the disk.
        greedy_ids: int64 [T, G] or None: row t holds the target's G greedy tokens after tokens 0..t.
    """

    id: str
    input_ids: Tensor
    loss_mask: Tensor
    hidden: Mapping[str, Tensor]
    greedy_ids: Tensor | None


@dataclass(frozen=True)
class ShardContent:
    """Tensors of one shard before it is written; shapes as in the module's docstring.

    Attributes:
        ids: one a sample.
        offsets: int64 [n + 1].
        input_ids: int32 [T].
        loss_mask: bool [T].
        hidden: layer name -> [T, D].
        greedy_ids: int32 [T, G], or None.
        scales: layer name -> float32 [T], of states with eight bits; empty otherwise.
    """

    ids: Sequence[str]
    offsets: Tensor
    input_ids: Tensor
    loss_mask: Tensor
    hidden: dict[str, Tensor]
    greedy_ids: Tensor | None
    scales: dict[str, Tensor] = field(default_factory=dict)


def bytes_per_token(hidden_size: int, num_layers: int, dtype: torch.dtype, horizon: int) -> int:
    """Bytes that one token takes on disk: states (a scale with each of eight bits), id, mask and greedy tokens.

    Args:
        hidden_size: D.
        num_layers: of the cache.
        dtype: of the states.
        horizon: G.

    Returns:
        Bytes.
    """
    scale = torch.float32.itemsize if dtype == CODES else 0
    return num_layers * (hidden_size * dtype.itemsize + scale) + 5 + 4 * horizon


def write_shard(path: Path, content: ShardContent) -> ShardRecord:
    """Write a shard atomically; the same content gives the same bytes.

    Args:
        path: of the file.
        content: its tensors.

    Returns:
        The record of it.

    Raises:
        OSError: the disk does not take it; no partial file stays behind.
    """
    tensors = {
        "offsets": content.offsets.to(torch.int64),
        "input_ids": content.input_ids.to(torch.int32),
        "loss_mask": content.loss_mask.to(torch.bool),
        **{HIDDEN + name: states for name, states in content.hidden.items()},
        **{SCALE + name: scales for name, scales in content.scales.items()},
    }
    if content.greedy_ids is not None:
        tensors["greedy_ids"] = content.greedy_ids.to(torch.int32)
    payload = safetensors.torch.save(tensors, metadata={_IDS: json.dumps(list(content.ids), ensure_ascii=False)})
    atomic_write(path, payload, clear=False)  # its folder may hold very many
    return ShardRecord(
        name=path.name,
        sha256=hashlib.sha256(payload).hexdigest(),
        num_bytes=len(payload),
        num_samples=len(content.ids),
        num_tokens=int(content.input_ids.shape[0]),
        num_labelled=int(content.loss_mask.sum()),
    )


class ShardReader:
    """Reads one shard through a memory map: states of a sample are views, nothing is copied until it is used.

    Args:
        path: the shard's file.
        record: what its manifest says of it.
        identity: of its cache: layers, their width and dtype.
        vocab_size: token ids must be below it; None where nobody knows.
        finite: refuse states that are not finite when they are read.

    Raises:
        ValueError: the file is missing, cut off, of another size than its record, laid out differently, or at odds with
            itself: see `shard_checks.py`.
    """

    def __init__(
        self,
        path: Path,
        record: ShardRecord,
        identity: CacheIdentity,
        vocab_size: int | None = None,
        finite: bool = True,
    ) -> None:
        self.path, self.record, self._finite = path, record, finite
        check_size(path, record)
        try:
            with safetensors.safe_open(path, framework="pt") as file:
                kinds = {name: _kind(file.get_slice(name)) for name in file.keys()}  # noqa: SIM118  (no mapping)
                check_layout(kinds, identity, record, str(path))
                self.ids = sample_ids(file.metadata(), _IDS, record, str(path))
                offsets, self._input_ids, self._loss_mask = (file.get_tensor(name) for name in TEXT)
                self._hidden = {layer: file.get_tensor(HIDDEN + layer) for layer in identity.layers}
                self._scales = {
                    layer: file.get_tensor(SCALE + layer) for layer in identity.layers if SCALE + layer in kinds
                }
                self._greedy_ids = file.get_tensor("greedy_ids") if "greedy_ids" in kinds else None
        except safetensors.SafetensorError as error:
            raise ValueError(f"{path} is damaged ({error}); delete it and run the extraction again") from error
        check_text(offsets, self._input_ids, self._loss_mask, record, vocab_size, str(path))
        if self._greedy_ids is not None:
            check_ids("greedy_ids", self._greedy_ids, vocab_size, str(path))
        self.offsets: list[int] = offsets.tolist()

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> CachedSample:
        start, stop = self.offsets[index], self.offsets[index + 1]
        greedy = self._greedy_ids
        return CachedSample(
            id=self.ids[index],
            input_ids=self._input_ids[start:stop].long(),
            loss_mask=self._loss_mask[start:stop],
            hidden=self._states(start, stop, f"{self.path}: sample {self.ids[index]}"),
            greedy_ids=None if greedy is None else greedy[start:stop].long(),
        )

    def check_vocabulary(self, vocab_size: int) -> None:
        """Check that token ids are of a vocabulary, which is known only now.

        Args:
            vocab_size: of the target.

        Raises:
            ValueError: an id is outside.
        """
        check_ids("input_ids", self._input_ids, vocab_size, str(self.path))
        if self._greedy_ids is not None:
            check_ids("greedy_ids", self._greedy_ids, vocab_size, str(self.path))

    def check_states(self) -> None:
        """Read every state.

        Raises:
            ValueError: for the first sample that holds NaN or infinity.
        """
        for index in range(len(self)):
            hidden = self[index].hidden
            for layer in hidden:
                hidden[layer]

    def _states(self, start: int, stop: int, place: str) -> Mapping[str, Tensor]:
        if not self._scales:
            states = {layer: stored[start:stop] for layer, stored in self._hidden.items()}
            return WholeStates(states, place) if self._finite else states
        codes, scales = (
            {layer: [stored[start:stop]] for layer, stored in of.items()} for of in (self._hidden, self._scales)
        )
        return EightBitStates(codes, scales, [place], self._finite)


class WholeStates(Mapping[str, Tensor]):
    """A sample's states by layer, each checked to be finite when it is asked for.

    Args:
        states: layer name -> [T, D].
        place: what errors call the sample.
    """

    def __init__(self, states: Mapping[str, Tensor], place: str) -> None:
        self._stored, self._place = states, place

    def __getitem__(self, layer: str) -> Tensor:
        states = self._stored[layer]
        check_finite(states, f"{self._place}: {HIDDEN}{layer}")
        return states

    def __iter__(self) -> Iterator[str]:
        return iter(self._stored)

    def __len__(self) -> int:
        return len(self._stored)


def _kind(part: Any) -> TensorKind:
    """Of a slice that safetensors has not read yet."""
    return TensorKind(part.get_dtype(), tuple(part.get_shape()))


def check_size(path: Path, record: ShardRecord) -> None:
    """Check that a shard is there and has the size that its record says.

    Args:
        path: of the file.
        record: what its manifest says of it.

    Raises:
        ValueError: it is missing or has another size.
    """
    if not path.is_file():
        raise ValueError(f"{path} is missing; run the extraction again, it makes only what is not there")
    size = path.stat().st_size
    if size != record.num_bytes:
        raise ValueError(
            f"{path} has {size} bytes, its record says {record.num_bytes}: it was cut off or changed; "
            "delete it and run the extraction again"
        )


def check_digest(path: Path, record: ShardRecord) -> None:
    """Check that every byte of a shard is as it was written.

    Args:
        path: of the file.
        record: what its manifest says of it.

    Raises:
        ValueError: one differs.
    """
    check_size(path, record)
    if sha256_file(path) != record.sha256:
        raise ValueError(
            f"{path} was altered: its sha256 is not the recorded one; delete it and run the extraction again"
        )
