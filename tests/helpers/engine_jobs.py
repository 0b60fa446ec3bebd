"""Several training runs in one group of processes: importing costs more than all of them together.

`python engine_jobs.py JOBS.json DEVICES cpu|gpu`, once for each process, with LOCAL_RANK, MASTER_ADDR and MASTER_PORT set.
"""

import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from every_family import EVERY_FAMILY, for_two_layers
from pytorch_lightning.callbacks import ModelCheckpoint
from pytorch_lightning.strategies import DDPStrategy, Strategy
from training import make_module, make_trainer

from draftsmith.train.batches.data_module import CacheDataModule
from draftsmith.train.drafter.starting_drafter import LoraSettings
from draftsmith.train.drafter_callbacks.keep_best_drafter import KeepBestDrafter
from draftsmith.train.drafter_callbacks.tree_decode_validation import TreeDecodeValidation
from draftsmith.train.run.strategies import FullyShard, Zero

FAMILIES = {family.name: family for family in EVERY_FAMILY}


@dataclass
class Job:
    """One run; its results lie in `folder`: record{RANK}.json, checkpoints/step=N.ckpt, drafter/.

    adapt: a drafter's folder, to train LoRA on it; resume: a checkpoint to resume from; die_before: the step before which
    the process kills itself; expect: words of the refusal that ends the run.
    """

    engine: str
    folder: str
    target: str
    cache: str
    family: str = "redrafter"
    family_settings: dict[str, Any] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)
    trainer: dict[str, Any] = field(default_factory=dict)
    data: dict[str, Any] = field(default_factory=dict)
    verb: str = "fit"
    adapt: str | None = None
    resume: str | None = None
    die_before: int | None = None
    expect: str | None = None


def held(weight: Any) -> int:
    """Numbers of a weight that this process keeps between steps."""
    share = weight.ds_tensor.numel() if hasattr(weight, "ds_tensor") else 0
    return share + (weight.to_local().numel() if hasattr(weight, "to_local") else weight.numel())


class Record(pl.Callback):
    """Notes what was logged and what this process holds, and kills it before a step."""

    def __init__(self, die_before: int | None) -> None:
        self.die_before = die_before
        self.losses: list[float] = []
        self.metrics: dict[str, float] = {}

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if trainer.global_step == self.die_before:
            os.kill(os.getpid(), signal.SIGKILL)

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        loss = outputs["loss"].detach().clone()
        if trainer.world_size > 1:
            torch.distributed.all_reduce(loss)
        self.losses.append(float(loss) / trainer.world_size)

    def on_validation_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
        self.metrics = {name: float(value) for name, value in trainer.callback_metrics.items() if "/" in name}

    def on_train_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
        optimizer = trainer.strategy.optimizers[0]
        states = getattr(optimizer, "optimizer", optimizer).state.values()
        self.metrics["weights held"] = sum(held(weight) for weight in pl_module.parameters())
        self.metrics["states held"] = sum(held(state["exp_avg"]) for state in states)


def strategy(engine: str, on_gpu: bool) -> Strategy | str:
    if engine == "one":
        return "auto"
    if engine == "ddp":
        return DDPStrategy(gradient_as_bucket_view=True)  # as in configs/engines/ddp.yaml
    if engine == "fsdp2":
        return FullyShard()
    kind: type[Zero] = Zero
    if not on_gpu:
        from cpu_deepspeed import ZeroOnCpu as kind
    zero = kind(stage=int(engine[-1]), bucket_size=10_000)  # type: ignore[arg-type]
    assert isinstance(zero.config, dict)
    # DeepSpeed leaves weights below 100 000 numbers whole: all that tests have.
    zero.config["zero_optimization"]["stage3_param_persistence_threshold"] = 0
    return zero


def run(job: Job, devices: int, on_gpu: bool = False) -> None:
    folder = Path(job.folder)
    record = Record(job.die_before)
    data = CacheDataModule(Path(job.cache), **({"val_fraction": 0.25, "tokens_per_batch": 36 // devices} | job.data))
    chosen: dict[str, Any] = {"drafter": for_two_layers(FAMILIES[job.family], **job.family_settings), "ema_decay": 0.8}
    module = make_module(Path(job.target), **(chosen | job.settings | _adapter(job)))
    # Each process draws weights of its own, and all must begin with the first one's.
    torch.manual_seed(1 + int(os.environ.get("LOCAL_RANK", 0)))
    trainer = make_trainer(
        folder,
        devices=devices,
        accelerator="gpu" if on_gpu else "cpu",
        strategy=strategy(job.engine, on_gpu),
        enable_checkpointing=True,
        callbacks=[
            TreeDecodeValidation(num_prompts=2, max_new_tokens=8),
            KeepBestDrafter(),
            ModelCheckpoint(folder / "checkpoints", "{step}", save_top_k=-1, every_n_train_steps=1),
            record,
        ],
        **({"max_epochs": 2, "gradient_clip_val": 0.05} | job.trainer),
    )
    try:
        getattr(trainer, job.verb)(module, datamodule=data, ckpt_path=job.resume)
    except ValueError as error:
        if job.expect is None:
            raise
        record.metrics["refused"] = float(job.expect in str(error))
    text = json.dumps({"losses": record.losses, "metrics": record.metrics})
    (folder / f"record{trainer.global_rank}.json").write_text(text)


def _adapter(job: Job) -> dict[str, Any]:
    if job.adapt is None:
        return {}
    return {"init_from": Path(job.adapt), "lora": LoraSettings(rank=2, alpha=4)}


def launch(jobs: Sequence[Job], folder: Path, devices: int = 2, kind: str = "cpu", timeout: float = 600.0) -> list[int]:
    """Runs the jobs in processes of their own, one a device; their exit codes. Nothing outlives this call."""
    path = folder / "jobs.json"
    path.write_text(json.dumps([asdict(job) for job in jobs]))
    for job in jobs:
        Path(job.folder).mkdir(parents=True, exist_ok=True)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = os.environ | {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "DS_ACCELERATOR": {"cpu": "cpu", "gpu": "cuda"}[kind],
        "PYTHONPATH": os.pathsep.join(str(folder) for folder in Path(__file__).parents[:2]),
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
    }
    processes = []
    for rank in range(devices):
        with open(folder / f"log{rank}.txt", "w") as log:
            processes.append(
                subprocess.Popen(
                    [sys.executable, __file__, str(path), str(devices), kind],
                    env=environment | {"LOCAL_RANK": str(rank)},
                    stdout=log,
                    stderr=subprocess.STDOUT,
                )
            )
    try:
        return [process.wait(timeout) for process in processes]
    finally:
        for process in processes:
            process.kill()
            process.wait()


if __name__ == "__main__":
    for entry in json.loads(Path(sys.argv[1]).read_text()):
        run(Job(**entry), int(sys.argv[2]), sys.argv[3] == "gpu")
