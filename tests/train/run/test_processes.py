"""Training in processes of its own: two ranks against one, and a run that is killed and resumed."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from training import MakeCache, tiny_config

SCRIPT = Path(__file__).resolve().parents[3] / "train.py"


def command(config: Path, *arguments: str) -> list[str]:
    return [sys.executable, str(SCRIPT), "fit", f"--config={config}", *arguments]


def train(config: Path, *arguments: str) -> None:
    done = subprocess.run(command(config, *arguments), capture_output=True, text=True, timeout=800)
    assert done.returncode == 0, done.stderr[-3000:]


def scalars(run: Path, name: str) -> list[float]:
    events = EventAccumulator(str(run))
    events.Reload()
    return [event.value for event in events.Scalars(name)]


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_two_processes_train_as_one_does_on_the_joint_batch(
    target_dir: Path, make_cache: MakeCache, tmp_path: Path
) -> None:
    cache = make_cache([7, 12, 9, 15, 8, 11, 14, 9, 10, 13, 8, 12])
    runs = {}
    for devices, tokens in ((1, 40), (2, 20)):
        folder = tmp_path / str(devices)
        folder.mkdir()
        strategy = ["--trainer.strategy=ddp"] if devices > 1 else []
        train(
            tiny_config(folder, target_dir, cache),
            f"--trainer.devices={devices}",
            f"--data.init_args.tokens_per_batch={tokens}",
            *strategy,
        )
        runs[devices] = folder / "run"
    for name in ("train/loss", "train/step0/top1", "val/loss", "val/tokens_per_step", "val/accept_depth1"):
        alone, together = scalars(runs[1], name), scalars(runs[2], name)
        assert len(alone) >= 2
        assert together == pytest.approx(alone, rel=1e-4), name


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_a_run_killed_in_the_middle_goes_on_to_the_same_drafter(
    target_dir: Path, make_cache: MakeCache, tmp_path: Path
) -> None:
    cache = make_cache([9] * 20)
    results = {}
    for name in ("whole", "killed"):
        folder = tmp_path / name
        folder.mkdir()
        config = tiny_config(folder, target_dir, cache)
        long = "--trainer.max_epochs=12"
        if name == "killed":
            process = subprocess.Popen(command(config, long), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
            deadline = time.monotonic() + 800
            checkpoint = folder / "run" / "checkpoints" / "last.ckpt"
            while not checkpoint.exists() and process.poll() is None and time.monotonic() < deadline:
                time.sleep(0.01)
            assert process.poll() is None, "the run was over before it could be killed"
            os.kill(process.pid, signal.SIGKILL)
            process.wait()
            assert torch.load(checkpoint, weights_only=True)["global_step"] < 48
            train(config, long, "--ckpt_path=last")
        else:
            train(config, long)
        results[name] = load_file(folder / "run" / "drafter" / "model.safetensors")
    assert results["whole"].keys() == results["killed"].keys()
    assert all(torch.equal(value, results["killed"][key]) for key, value in results["whole"].items())
