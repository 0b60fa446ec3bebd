"""A small cache made without a target, for tests that spoil one: its tensors are plain, so that a change is a line."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import safe_open
from torch import Tensor

from draftsmith.data.shards.lengths import LENGTHS_FILE, write_lengths
from draftsmith.data.shards.manifest import CacheIdentity, Manifest
from draftsmith.data.shards.shards import ShardContent, write_shard
from draftsmith.files import sha256_file

LAYER, VOCAB, WIDTH = "last.pre_norm", 100, 4
LENGTHS = [[3, 5, 2], [4, 6], [1, 7, 2]]
Tensors = dict[str, Tensor]


def write_small_cache(folder: Path, dtype: str = "bfloat16") -> Path:
    """Eight samples in three shards, with greedy tokens; `dtype` is that of the states, or `float8_e4m3`."""
    identity = CacheIdentity(
        target="t",
        target_revision=None,
        target_fingerprint="f",
        tokenizer_fingerprint="k",
        template_fingerprint="c",
        layers=(LAYER,),
        hidden_size=WIDTH,
        dtype=dtype,
        target_dtype="float32",
        source="s",
        split=None,
        mask="m",
        max_length=32,
        local_horizon=2,
        shard_mib=1.0,
        batch_tokens=9,
        vocab_size=VOCAB,
    )
    records = [_write(folder, number, own, dtype) for number, own in enumerate(LENGTHS)]
    manifest = Manifest(
        identity,
        num_samples=sum(record.num_samples for record in records),
        num_tokens=sum(record.num_tokens for record in records),
        num_labelled=sum(record.num_labelled for record in records),
        num_dropped=0,
        num_cut=0,
        lengths_sha256=sha256_file(write_lengths(folder, [length for own in LENGTHS for length in own])),
    )
    manifest.with_shards(records).save(folder)
    return folder


def _write(folder: Path, number: int, lengths: list[int], dtype: str) -> Any:
    tokens = sum(lengths)
    ids_T = (torch.arange(tokens, dtype=torch.int32) + 31 * number) % VOCAB
    states_TD = torch.sin(torch.arange(tokens * WIDTH).reshape(tokens, WIDTH) + number)
    eight_bits = dtype == "float8_e4m3"
    content = ShardContent(
        ids=[f"s{number}-{place}" for place in range(len(lengths))],
        offsets=torch.tensor([0, *lengths]).cumsum(0),
        input_ids=ids_T,
        loss_mask=ids_T % 2 == 0,
        hidden={LAYER: states_TD.to(torch.float8_e4m3fn if eight_bits else getattr(torch, dtype))},
        greedy_ids=torch.stack([ids_T, ids_T], dim=1),
        scales={LAYER: torch.full((tokens,), 0.5)} if eight_bits else {},
    )
    return write_shard(folder / f"shard-{number:05d}.safetensors", content)


def spoil_shard(folder: Path, change: Callable[[Tensors], object], number: int = 1, ids: Any = None) -> None:
    """Changes a shard's tensors (or its samples' ids) and has the manifest agree with its bytes again: size and sha256."""
    path = folder / f"shard-{number:05d}.safetensors"
    tensors = safetensors.torch.load_file(path)
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    change(tensors)
    if ids is not None:
        metadata = {"ids": ids if isinstance(ids, str) else json.dumps(ids)}
    payload = safetensors.torch.save({name: tensor.contiguous() for name, tensor in tensors.items()}, metadata)
    path.write_bytes(payload)
    digest = hashlib.sha256(payload).hexdigest()
    change_manifest(folder, lambda manifest: manifest["shards"][number].update(sha256=digest, num_bytes=len(payload)))


def spoil_lengths(folder: Path, lengths: list[int]) -> None:
    """Other lengths, by whose sha256 the manifest stands."""
    write_lengths(folder, lengths)
    digest = sha256_file(folder / LENGTHS_FILE)
    change_manifest(folder, lambda manifest: manifest.update(lengths_sha256=digest))


def change_manifest(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Changes the manifest's JSON."""
    path = folder / "manifest.json"
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))
