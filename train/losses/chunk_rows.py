"""How many rows of logits a chunked loss holds at a time.

Owns: the rule, by vocabulary and free memory. Does not know: what the losses compute.

On a GPU thin chunks are slow. The gradient of a trained head is a sum over chunks, and each chunk reads and writes all of it: Vd x E
numbers for 2 x C x Vd x E operations. At 512 rows that takes as long as the product itself, so the rule takes more rows where they fit.
"""

from __future__ import annotations

import torch

FEWEST_ROWS, MOST_ROWS_CPU, MOST_ROWS_CUDA = 512, 4096, 8192
_SHARE = 8  # a chunk may take one part in so many of the free memory
_BYTES = 20  # of a logit: in bf16 and float32, its gradient in both, and the teacher's in both; an upper bound
_MULTIPLE = 64  # rows of the tiles that GPUs multiply


def default_chunk_rows(draft_vocab_size: int, free_bytes: int | None = None) -> int:
    """Rows of a chunk, at least 512: thinner matrix products waste the machine.

    Without free memory, about a million logits, which stay in a CPU's caches. With it, as many rows as an eighth of it holds.
    Example: 64 GiB free and a vocabulary of 128,000 -> 3,328 rows; a vocabulary of 32,000 -> 8,192.

    Args:
        draft_vocab_size: Vd.
        free_bytes: of a GPU; None for other devices.
    """
    if free_bytes is None:
        return max(FEWEST_ROWS, min(MOST_ROWS_CPU, 2**20 // max(1, draft_vocab_size)))
    rows = free_bytes // (_SHARE * _BYTES * max(1, draft_vocab_size))
    return max(FEWEST_ROWS, min(MOST_ROWS_CUDA, rows // _MULTIPLE * _MULTIPLE))


def chosen_chunk_rows(wanted: int | None, draft_vocab_size: int, device: torch.device) -> int | None:
    """The rows that a run takes: those that its settings say, else on CUDA by the memory that is free now.

    Args:
        wanted: the setting.
        draft_vocab_size: Vd.
        device: of the run, with its weights.

    Returns:
        the rows; None where the losses choose by the vocabulary alone.
    """
    free = free_memory(device)
    return wanted if wanted is not None or free is None else default_chunk_rows(draft_vocab_size, free)


def free_memory(device: torch.device) -> int | None:
    """Bytes of a CUDA device that this process can still allocate, or None for other devices.

    Args:
        device: one that is there.
    """
    if device.type != "cuda":
        return None
    unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return torch.cuda.mem_get_info(device)[0] + unused
