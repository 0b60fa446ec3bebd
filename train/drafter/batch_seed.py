"""What a batch draws at random (noise, dropout), as a function of the run, the batch and the process: it resumes anywhere."""

import hashlib

import pytorch_lightning as pl


def batch_seed(run_seed: int, module: pl.LightningModule, batch_idx: int) -> int:
    """A seed below 2^63 for one batch of one process.

    Args:
        run_seed: the same on all processes.
        module: knows the epoch and the process.
        batch_idx: of the epoch.
    """
    own = (run_seed, module.current_epoch, batch_idx, module.global_rank)
    return int.from_bytes(hashlib.sha256(repr(own).encode()).digest()[:8], "big") >> 1
