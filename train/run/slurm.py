"""A job under SLURM: the signal that asks it to come back, its place in the queue, and the checkpoint that the next job finds by itself.

Owns the names and the command of SLURM. Does not know when a run stops or what a checkpoint holds.
"""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path

import pytorch_lightning as pl
from lightning_fabric.plugins.environments import SLURMEnvironment
from pytorch_lightning.utilities.rank_zero import rank_zero_info, rank_zero_warn

_LINK = re.compile(r"hpc_ckpt_(\d+)\.ckpt")


def requeue_signal(trainer: pl.Trainer) -> int | None:
    """The number of the signal after which this job is to be requeued; None outside of SLURM, or with `auto_requeue=False`.

    Reads a private member of Lightning: the environment that the YAML's plugins name is nowhere else for a run on one device.
    """
    environment = trainer._accelerator_connector.cluster_environment
    if isinstance(environment, SLURMEnvironment) and environment.auto_requeue:
        return environment.requeue_signal
    return None


def link_for_requeue(root: Path, checkpoint: str) -> None:
    """Lets Lightning find a checkpoint where it looks for one by itself in a requeued job: `hpc_ckpt_N.ckpt` in the run's root folder.

    A link, always to the latest checkpoint, where Lightning would write another file at each requeue and leave it. An address with a
    scheme cannot be linked to, nor can every disk hold links; the job then needs `--ckpt_path last`.
    """
    if "://" in str(root) or "://" in checkpoint:
        return
    numbered = {int(name[1]): path for path in root.glob("*") if (name := _LINK.fullmatch(path.name))}
    newest = max(numbered, default=0)
    link = root / f"hpc_ckpt_{newest + 1}.ckpt"
    try:
        root.mkdir(parents=True, exist_ok=True)
        if newest and numbered[newest].is_symlink():
            link = numbered[newest]
            link.unlink()
        link.symlink_to(os.path.relpath(checkpoint, root))
    except OSError as error:
        rank_zero_warn(f"{link} cannot be made ({error}); the requeued job needs --ckpt_path last to resume")


def requeue() -> None:
    """Asks SLURM to put this job, or this task of an array, back into the queue. A failure is a warning, not an error."""
    array = os.environ.get("SLURM_ARRAY_JOB_ID")
    job = os.environ["SLURM_JOB_ID"] if array is None else f"{array}_{os.environ['SLURM_ARRAY_TASK_ID']}"
    try:
        done = subprocess.run(["scontrol", "requeue", job], capture_output=True, text=True, timeout=60, check=False)
        problem = "" if done.returncode == 0 else f"code {done.returncode}: {done.stderr.strip()}"
    except (OSError, subprocess.TimeoutExpired) as error:
        problem = str(error)
    if problem:
        rank_zero_warn(
            f"scontrol requeue {job} failed ({problem}); submit the job again, it resumes from its checkpoint"
        )
    else:
        rank_zero_info(f"SLURM job {job} is back in the queue")
