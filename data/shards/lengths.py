"""`lengths.safetensors` of a cache: how many tokens each sample has, so that planning an epoch opens no shard.

Owns: this file and its check against the manifest. Does not know: shards' own layout, where a cache lies, training.

Shape legend: N samples.
"""

import hashlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import safetensors
import safetensors.torch
import torch

from draftsmith.data.shards.manifest import Manifest
from draftsmith.files import atomic_write

LENGTHS_FILE = "lengths.safetensors"
_NAME = "lengths"


def write_lengths(folder: Path, lengths: Sequence[int] | np.ndarray) -> Path:
    """Write the tokens of each sample atomically; the same lengths give the same bytes.

    Args:
        folder: of the cache.
        lengths: int32 [N], in the order of the shards.

    Returns:
        The file.

    Raises:
        OSError: the disk does not take it.
    """
    path = Path(folder) / LENGTHS_FILE
    payload = safetensors.torch.save({_NAME: torch.from_numpy(np.asarray(lengths, dtype=np.int32))})
    atomic_write(path, payload)
    return path


def read_lengths(payload: bytes, manifest: Manifest, name: str) -> np.ndarray:
    """Read the lengths from the bytes of such a file.

    Args:
        payload: the bytes.
        manifest: of the cache.
        name: what errors call the file.

    Returns:
        int32 [N].

    Raises:
        ValueError: it is damaged, or its sha256 is not the one that the manifest names. Also where it does not give each shard of the
            manifest its number of tokens: then it belongs to another cache.
    """
    if manifest.lengths_sha256 not in (None, hashlib.sha256(payload).hexdigest()):
        raise ValueError(
            f"{name} was altered: its sha256 is not the recorded one; run the extraction again, or copy it again"
        )
    try:
        tensor = safetensors.torch.load(payload)[_NAME]
    except (safetensors.SafetensorError, KeyError) as error:
        raise ValueError(f"{name} is damaged ({error}); delete it: the shards' own lengths are read then") from error
    if tensor.dtype != torch.int32 or tensor.dim() != 1:
        raise ValueError(
            f"{name}: {_NAME} is {tensor.dtype} {list(tensor.shape)}, it must be int32 [{manifest.num_samples}]; delete it: the shards' "
            "own lengths are read then"
        )
    lengths = tensor.numpy()
    check_lengths(lengths, manifest, name)
    return lengths


def check_lengths(lengths: np.ndarray, manifest: Manifest, name: str) -> None:
    """Check that lengths are 1 or more and add up to the tokens of every shard.

    Args:
        lengths: int32 [N].
        manifest: of the cache.
        name: what errors call the lengths.

    Raises:
        ValueError: they are or do not.
    """
    ends = np.cumsum([shard.num_samples for shard in manifest.shards], dtype=np.int64)
    tokens = np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)])
    wanted = np.cumsum([shard.num_tokens for shard in manifest.shards], dtype=np.int64)
    whole = len(lengths) == manifest.num_samples and bool((lengths > 0).all())
    if not whole or not np.array_equal(tokens[ends], wanted):
        raise ValueError(
            f"{name} tells of {len(lengths)} samples and {int(tokens[-1])} tokens, which are not those of its manifest "
            f"({manifest.num_samples} and {manifest.num_tokens}, shard by shard); it belongs to another cache: delete it"
        )
