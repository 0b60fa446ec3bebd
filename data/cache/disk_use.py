"""What a cache takes on disk, against the same states kept as one file a sample.

Owns: that comparison. Does not know: how either is written.
"""

import functools
import io

import torch

from draftsmith.data.shards.manifest import Manifest

_MB = 1e6


def bytes_as_files(manifest: Manifest) -> int:
    """Bytes of a cache's samples if each were one `torch.save` file of bfloat16 states, int64 ids and an int64 mask.

    Over N samples, S tokens and L layers of D numbers: `S * (8 + 8 + 2 * L * D) + N * overhead`, the overhead of a file
    being measured. Same samples, same layers; the file system's rounding up to blocks does not count.

    Args:
        manifest: of the cache.

    Returns:
        Bytes.
    """
    identity = manifest.identity
    per_token = 8 + 8 + 2 * len(identity.layers) * identity.hidden_size
    return manifest.num_tokens * per_token + manifest.num_samples * file_overhead(len(identity.layers))


@functools.cache
def file_overhead(num_layers: int) -> int:
    """Bytes that `torch.save` adds to a dictionary of ids, mask and so many layers of states, measured on one token.

    Args:
        num_layers: of the cache.

    Returns:
        Bytes of one file.
    """
    tensors = {name: torch.zeros(1, dtype=torch.int64) for name in ("input_ids", "loss_mask")}
    tensors |= {f"hidden_state_{number}": torch.zeros(1, 1, dtype=torch.bfloat16) for number in range(num_layers)}
    buffer = io.BytesIO()
    torch.save(tensors, buffer)
    return len(buffer.getvalue()) - sum(tensor.nbytes for tensor in tensors.values())


def footprint(manifest: Manifest) -> str:
    """Write the comparison in a line.

    Args:
        manifest: of the cache.

    Returns:
        The line.
    """
    here = sum(shard.num_bytes for shard in manifest.shards)
    return (
        f"on disk: {here / _MB:,.1f} MB, {here / manifest.num_tokens:,.0f} bytes a token ({manifest.identity.dtype} states); "
        f"one torch.save file for each sample, in bfloat16, would take {bytes_as_files(manifest) / _MB:,.1f} MB"
    )
