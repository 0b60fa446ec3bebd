"""Runs that get a signal to stop, in one process: where they stop, what they leave, and that the resumed run is the undisturbed one."""

import multiprocessing
import os
import pickle
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from judging import LENGTHS, judge_data, judge_module, rows_of, save_rows
from pytorch_lightning.callbacks import GradientAccumulationScheduler, ModelCheckpoint
from pytorch_lightning.plugins.environments import SLURMEnvironment
from pytorch_lightning.strategies import SingleDeviceStrategy
from training import MakeCache, make_module, make_trainer, tiny_config

from draftsmith.models.families.eagle import EagleFamily
from draftsmith.train.batches.data_module import CacheDataModule
from draftsmith.train.cli import main
from draftsmith.train.drafter.module import DraftModule
from draftsmith.train.drafter_callbacks.keep_best_drafter import KeepBestDrafter
from draftsmith.train.drafter_callbacks.tree_decode_validation import TreeDecodeValidation
from draftsmith.train.judge.callbacks import KeepJudge
from draftsmith.train.run.checkpoints import AtomicCheckpointIO
from draftsmith.train.run.preemption import Preemption
from draftsmith.train.run.resume_validation import ResumeValidation
from draftsmith.train.run.slurm import link_for_requeue, requeue


class Tell(pl.Callback):
    """Sends a signal to this process at one hook of one step, and notes the steps at which validation ended."""

    def __init__(self, hook: str = "", step: int = -1, number: int = signal.SIGTERM) -> None:
        self.hook, self.step, self.number = hook, step, number
        self.validated: list[int] = []

    def _tell(self, hook: str, trainer: pl.Trainer) -> None:
        if hook == self.hook and trainer.global_step == self.step:
            self.hook = ""
            signal.raise_signal(self.number)

    def on_train_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        self._tell("train_start", trainer)

    def on_train_batch_start(self, trainer: pl.Trainer, module: pl.LightningModule, batch: Any, batch_idx: int) -> None:
        self._tell("batch_start", trainer)

    def on_train_batch_end(self, trainer: pl.Trainer, *args: Any) -> None:
        self._tell("batch_end", trainer)

    def on_validation_epoch_start(self, trainer: pl.Trainer, *args: Any) -> None:
        self._tell("validation", trainer)

    def on_validation_epoch_end(self, trainer: pl.Trainer, *args: Any) -> None:
        self._tell("decoding", trainer)

    def on_validation_end(self, trainer: pl.Trainer, *args: Any) -> None:
        self.validated.append(trainer.global_step)


def run(
    folder: Path, target: Path, cache: Path, tell: Tell | None = None, resume: bool = False, **settings: Any
) -> tuple[pl.Trainer, DraftModule, Tell]:
    """12 steps in 3 epochs of 4, validation twice an epoch; noise on the features makes every random number count."""
    module = make_module(target, drafter=EagleFamily(feature_noise=0.1), num_steps=1, ema_decay=0.9)
    data = CacheDataModule(cache, val_fraction=0.2, tokens_per_batch=20)
    tell = tell or Tell()
    callbacks = [
        TreeDecodeValidation(num_prompts=2, max_new_tokens=8, draft_length=2),
        tell,
        KeepBestDrafter(),
        ModelCheckpoint(folder / "checkpoints", save_last=True, save_top_k=0, every_n_train_steps=3),
        ResumeValidation(),
        Preemption(),
    ]
    chosen = {"max_epochs": 3, "val_check_interval": 0.5, "enable_checkpointing": True, "callbacks": callbacks}
    trainer = make_trainer(folder, **(chosen | settings))  # type: ignore[arg-type]
    # A process starts with other random numbers than the one whose run it resumes.
    torch.manual_seed(99 if resume else 0)
    trainer.fit(module, data, ckpt_path=str(folder / "checkpoints" / "last.ckpt") if resume else None)
    return trainer, module, tell


def assert_same_weights(module: pl.LightningModule, other: pl.LightningModule) -> None:
    mine, others = module.state_dict(), other.state_dict()
    assert mine.keys() == others.keys()
    assert all(torch.equal(value, others[name]) for name, value in mine.items())


def run_until_told(*arguments: Any, **settings: Any) -> None:
    with pytest.raises(SystemExit) as exit_info:
        run(*arguments, **settings)
    assert not exit_info.value.code


def step_of(checkpoint: Path) -> int:
    return int(torch.load(checkpoint, weights_only=True)["global_step"])


@pytest.fixture(scope="module")
def cache(make_cache: MakeCache) -> Path:
    return make_cache([9] * 10)


@pytest.fixture(scope="module")
def undisturbed(
    target_dir: Path, cache: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[pl.Trainer, DraftModule, Tell]:
    return run(tmp_path_factory.mktemp("whole"), target_dir, cache)


def slurm_job(folder: Path, monkeypatch: pytest.MonkeyPatch, exit_code: int = 0) -> Path:
    """This process as the only task of job 4711, with an scontrol that notes what it is asked; gives its notes."""
    notes = folder / "scontrol.log"
    (folder / "bin").mkdir(parents=True)
    script = folder / "bin" / "scontrol"
    script.write_text(f'#!/bin/sh\necho "$@" >> {notes}\necho "no such job" >&2\nexit {exit_code}\n')
    script.chmod(0o755)
    monkeypatch.setenv("PATH", f"{script.parent}:{os.environ['PATH']}")
    names = {"JOB_ID": "4711", "NTASKS": "1", "JOB_NAME": "train", "PROCID": "0", "LOCALID": "0", "NODEID": "0"}
    for name, value in names.items():
        monkeypatch.setenv(f"SLURM_{name}", value)
    return notes


@pytest.mark.parametrize(
    ("hook", "step", "stops_at"),
    [
        ("train_start", 0, 1),  # before the callback has taken the signals over from Lightning
        ("batch_start", 4, 5),
        ("batch_end", 3, 3),  # where ModelCheckpoint writes too
        ("batch_end", 4, 4),  # before a validation at the end of an epoch
        ("batch_end", 6, 6),  # before one in its middle
        ("validation", 6, 6),
        ("decoding", 8, 8),
        ("decoding", 12, 12),  # in the last validation of the run
    ],
)
def test_a_run_told_to_go_resumes_to_the_weights_of_an_undisturbed_one(
    target_dir: Path,
    cache: Path,
    tmp_path: Path,
    undisturbed: tuple[pl.Trainer, DraftModule, Tell],
    hook: str,
    step: int,
    stops_at: int,
) -> None:
    _, expected, calm = undisturbed
    told = Tell(hook, step)
    run_until_told(tmp_path, target_dir, cache, told)
    assert step_of(tmp_path / "checkpoints" / "last.ckpt") == stops_at
    resumed, module, after = run(tmp_path, target_dir, cache, resume=True)
    assert resumed.global_step == 12
    assert_same_weights(module, expected)
    # No validation is lost, and none that was finished is done twice.
    assert told.validated + after.validated == calm.validated == [2, 4, 6, 8, 10, 12]


def test_a_run_stops_between_optimiser_steps_not_between_the_batches_of_one(
    target_dir: Path, cache: Path, tmp_path: Path
) -> None:
    settings = {"accumulate_grad_batches": 2, "val_check_interval": 1.0}
    _, expected, _ = run(tmp_path / "whole", target_dir, cache, **settings)
    told = Tell("batch_start", 2)
    run_until_told(tmp_path, target_dir, cache, told, **settings)
    content = torch.load(tmp_path / "checkpoints" / "last.ckpt", weights_only=True)
    assert content["global_step"] == 3
    assert content["loops"]["fit_loop"]["epoch_loop.batch_progress"]["total"]["processed"] == 6
    _, module, _ = run(tmp_path, target_dir, cache, resume=True, **settings)
    assert_same_weights(module, expected)


@pytest.mark.parametrize(
    ("settings", "hook", "step"),
    [
        ({"accumulate_grad_batches": 2, "val_check_interval": 0.5}, "validation", 3),
        # The last step of an epoch is made of what is left over.
        ({"accumulate_grad_batches": 3, "val_check_interval": 3}, "decoding", 3),
        ({"accumulate_grad_batches": 3, "val_check_interval": 1.0}, "validation", 2),
        ({"accumulate_grad_batches": 2, "val_check_interval": 2, "check_val_every_n_epoch": None}, "validation", 3),
    ],
)
def test_a_run_told_to_go_in_a_validation_between_accumulations_resumes_to_the_same_weights(
    target_dir: Path, cache: Path, tmp_path: Path, settings: dict[str, Any], hook: str, step: int
) -> None:
    _, expected, calm = run(tmp_path / "whole", target_dir, cache, **settings)
    told = Tell(hook, step)
    run_until_told(tmp_path, target_dir, cache, told, **settings)
    assert step_of(tmp_path / "checkpoints" / "last.ckpt") == step
    _, module, after = run(tmp_path, target_dir, cache, resume=True, **settings)
    assert_same_weights(module, expected)
    assert told.validated + after.validated == calm.validated


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        (
            {"accumulate_grad_batches": 4, "val_check_interval": 0.5},
            r"grad_batches is 4, and validation comes after every 2 batches of 4 in an epoch: .* set trainer\.val_check_interval to 1\.0, "
            r"the end of every epoch, or trainer\.accumulate_grad_batches to a number that divides 2$",
        ),
        (
            {"accumulate_grad_batches": 2, "val_check_interval": 3},
            r"after every 3 batches of 4 .* or to a number of batches that 2 divides, or .* that divides 3$",
        ),
        ({"accumulate_grad_batches": 2, "val_check_interval": 0.25, "check_val_every_n_epoch": 2}, "after every 1 "),
        # 3, 6, 9 and 12 are batches 3, 2, 1 and 4 of their epochs.
        (
            {"accumulate_grad_batches": 3, "val_check_interval": 3, "check_val_every_n_epoch": None},
            r"counted over epochs .* set trainer\.check_val_every_n_epoch to 1; then trainer\.val_check_interval to 1\.0",
        ),
        (
            {"accumulate_grad_batches": 2, "val_check_interval": "00:00:01:00"},
            r"comes by the clock .*, after any batch",
        ),
    ],
)
def test_a_validation_that_can_fall_inside_an_accumulation_is_refused_before_the_first_step(
    target_dir: Path, cache: Path, tmp_path: Path, settings: dict[str, Any], told: str
) -> None:
    tell = Tell()
    with pytest.raises(ValueError, match=told):
        run(tmp_path, target_dir, cache, tell, **settings)
    assert tell.validated == []


def test_an_accumulation_that_a_later_epoch_brings_is_refused_too(
    target_dir: Path, cache: Path, tmp_path: Path
) -> None:
    callbacks = [GradientAccumulationScheduler({1: 4}), Preemption()]
    with pytest.raises(ValueError, match="accumulate_grad_batches is 4"):
        run(tmp_path, target_dir, cache, callbacks=callbacks)


@pytest.mark.parametrize(
    "settings",
    [
        {"accumulate_grad_batches": 4, "val_check_interval": 0.5, "limit_val_batches": 0},
        {"accumulate_grad_batches": 1, "val_check_interval": "00:00:01:00"},
        # One epoch only, so that counting goes over no end of one.
        {"accumulate_grad_batches": 3, "val_check_interval": 3, "check_val_every_n_epoch": None, "max_epochs": 1},
        {"accumulate_grad_batches": 3, "val_check_interval": 8, "check_val_every_n_epoch": None},
    ],
)
def test_an_accumulation_in_which_no_validation_falls_is_accepted(
    target_dir: Path, cache: Path, tmp_path: Path, settings: dict[str, Any]
) -> None:
    run(tmp_path, target_dir, cache, callbacks=[Preemption()], **settings)


def test_an_accumulation_is_accepted_where_nothing_is_held_out(target_dir: Path, cache: Path, tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, accumulate_grad_batches=4, val_check_interval=0.5, callbacks=[Preemption()])
    trainer.fit(make_module(target_dir), CacheDataModule(cache, val_fraction=0.0, tokens_per_batch=20))
    assert (trainer.num_training_batches, trainer.val_check_batch, trainer.global_step) == (4, 2, 1)


def test_an_accumulation_that_deepspeed_would_carry_over_the_end_of_an_epoch_is_refused(
    target_dir: Path, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(SingleDeviceStrategy, "handles_gradient_accumulation", True)
    settings: dict[str, Any] = {"val_check_interval": 1.0, "max_epochs": 1}
    with pytest.raises(
        ValueError, match=r"the last 1 of an epoch's 4 batches .*limit_train_batches to a multiple of 3"
    ):
        run(tmp_path / "3", target_dir, cache, accumulate_grad_batches=3, limit_val_batches=0, **settings)
    run(tmp_path / "2", target_dir, cache, accumulate_grad_batches=2, **settings)


def test_the_training_command_refuses_it_before_the_first_step(target_dir: Path, cache: Path, tmp_path: Path) -> None:
    changes = ["--trainer.accumulate_grad_batches=2", "--trainer.val_check_interval=1"]
    with pytest.raises(ValueError, match="after every 1 batches of 2"):
        main(["fit", f"--config={tiny_config(tmp_path, target_dir, cache)}", *changes])


def test_a_signal_to_every_process_of_a_job_reaches_the_checkpoint_before_the_loaders_workers_die(
    target_dir: Path, cache: Path, tmp_path: Path
) -> None:
    class TellAll(Tell):
        def _tell(self, hook: str, trainer: pl.Trainer) -> None:
            if hook == self.hook and trainer.global_step == self.step:
                workers = multiprocessing.active_children()
                assert workers
                for worker in workers:
                    assert worker.pid is not None
                    os.kill(worker.pid, signal.SIGTERM)
                # A death would be noticed here: torch raises as soon as a worker is gone.
                time.sleep(0.5)
                assert all(worker.is_alive() for worker in workers)
            super()._tell(hook, trainer)

    module, keeper = make_module(target_dir), ModelCheckpoint(tmp_path / "checkpoints", save_last=True, save_top_k=0)
    trainer = make_trainer(
        tmp_path, max_epochs=3, enable_checkpointing=True, callbacks=[TellAll("batch_start", 1), keeper, Preemption()]
    )
    with pytest.raises(SystemExit) as exit_info:
        trainer.fit(module, CacheDataModule(cache, val_fraction=0.2, tokens_per_batch=20, num_workers=1))
    assert not exit_info.value.code
    assert step_of(tmp_path / "checkpoints" / "last.ckpt") == 2
    assert not multiprocessing.active_children()


class CountingIO(AtomicCheckpointIO):
    """Notes which step went to which file."""

    def __init__(self) -> None:
        super().__init__()
        self.written: list[tuple[str, int]] = []

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        self.written.append((Path(path).name, checkpoint["global_step"]))
        super().save_checkpoint(checkpoint, path, storage_options)


def test_no_step_is_written_twice(target_dir: Path, cache: Path, tmp_path: Path) -> None:
    writer = CountingIO()
    run_until_told(tmp_path, target_dir, cache, Tell("batch_end", 9), plugins=[writer])
    # Every 3 steps by ModelCheckpoint, every 2 before a validation; 6 is both, 9 is where the run stops.
    assert writer.written == [("last.ckpt", step) for step in (2, 3, 4, 6, 8, 9)]


def test_what_the_checkpoint_callback_keeps_at_the_same_step_is_kept(
    target_dir: Path, cache: Path, tmp_path: Path
) -> None:
    keeper = ModelCheckpoint(
        tmp_path / "kept", "{step}", monitor="val/loss", save_top_k=-1, save_last=True, auto_insert_metric_name=False
    )
    callbacks = [Tell("batch_start", 4), keeper, ResumeValidation(), Preemption()]
    run_until_told(tmp_path, target_dir, cache, callbacks=callbacks)
    assert sorted(path.name for path in (tmp_path / "kept").iterdir()) == ["2.ckpt", "4.ckpt", "last.ckpt"]
    assert step_of(tmp_path / "kept" / "last.ckpt") == 5


def test_a_checkpoint_of_another_run_in_the_folder_is_left_alone(target_dir: Path, cache: Path, tmp_path: Path) -> None:
    other = tmp_path / "checkpoints" / "last.ckpt"
    other.parent.mkdir()
    other.write_bytes(b"of another run")
    run_until_told(tmp_path, target_dir, cache, Tell("batch_start", 4))
    assert other.read_bytes() == b"of another run"
    assert step_of(other.with_name("last-v1.ckpt")) == 5


def test_a_crash_in_validation_costs_neither_the_steps_before_it_nor_the_validation(
    target_dir: Path, cache: Path, tmp_path: Path, undisturbed: tuple[pl.Trainer, DraftModule, Tell]
) -> None:
    class Crash(Tell):
        def _tell(self, hook: str, trainer: pl.Trainer) -> None:
            if hook == self.hook and trainer.global_step == self.step:
                raise RuntimeError("out of memory")

    crash = Crash("decoding", 10)
    with pytest.raises(RuntimeError, match="out of memory"):
        run(tmp_path, target_dir, cache, crash)
    _, module, after = run(tmp_path, target_dir, cache, resume=True)
    assert crash.validated + after.validated == [2, 4, 6, 8, 10, 12]
    assert_same_weights(module, undisturbed[1])


def test_a_run_that_keeps_no_checkpoints_ends_too_and_says_so(target_dir: Path, cache: Path, tmp_path: Path) -> None:
    callbacks = [Tell("batch_start", 4), ResumeValidation(), Preemption()]
    with pytest.warns(UserWarning, match="there is no checkpoint"):
        run_until_told(tmp_path, target_dir, cache, callbacks=callbacks, enable_checkpointing=False)
    assert not list(tmp_path.glob("**/*.ckpt"))


def test_the_callbacks_can_be_sent_to_spawned_processes_before_and_after_a_run(
    target_dir: Path, cache: Path, tmp_path: Path
) -> None:
    callbacks = [ResumeValidation(), Preemption()]
    assert pickle.dumps(callbacks)
    run(tmp_path, target_dir, cache, max_epochs=1, callbacks=callbacks, enable_checkpointing=False)
    assert pickle.dumps(callbacks)


def test_signals_are_given_back_after_the_run(target_dir: Path, cache: Path, tmp_path: Path) -> None:
    before = signal.getsignal(signal.SIGTERM)
    run(tmp_path, target_dir, cache, max_epochs=1)
    assert signal.getsignal(signal.SIGTERM) is before
    assert signal.set_wakeup_fd(-1) == -1


def test_a_judge_told_to_go_resumes_to_the_same_judge(target_dir: Path, make_cache: MakeCache, tmp_path: Path) -> None:
    cache = make_cache(LENGTHS)
    rows = save_rows(tmp_path, rows_of(cache))

    def train(name: str, tell: Tell | None = None, resume: bool = False) -> pl.LightningModule:
        module, folder = judge_module(target_dir, iterations=2), tmp_path / name
        keeper = ModelCheckpoint(folder / "checkpoints", save_last=True, save_top_k=0)
        callbacks = [*([tell] if tell else []), KeepJudge(), keeper, ResumeValidation(), Preemption()]
        trainer = make_trainer(folder, max_epochs=6, enable_checkpointing=True, callbacks=callbacks)
        path = str(folder / "checkpoints" / "last.ckpt") if resume else None
        trainer.fit(module, judge_data(cache, rows), ckpt_path=path)
        return module

    whole = train("whole")
    with pytest.raises(SystemExit) as exit_info:
        train("told", Tell("batch_start", 3))
    assert not exit_info.value.code
    assert step_of(tmp_path / "told" / "checkpoints" / "last.ckpt") == 4
    assert_same_weights(train("told", resume=True), whole)


@pytest.mark.parametrize(("hook", "step"), [("batch_start", 6), ("decoding", 6)])
def test_slurms_signal_saves_asks_for_a_requeue_and_ends_and_the_requeued_job_goes_on_by_itself(
    target_dir: Path,
    cache: Path,
    tmp_path: Path,
    undisturbed: tuple[pl.Trainer, DraftModule, Tell],
    monkeypatch: pytest.MonkeyPatch,
    hook: str,
    step: int,
) -> None:
    notes = slurm_job(tmp_path, monkeypatch)
    run_until_told(tmp_path, target_dir, cache, Tell(hook, step, signal.SIGUSR1))
    assert notes.read_text() == "requeue 4711\n"
    assert (tmp_path / "hpc_ckpt_1.ckpt").samefile(tmp_path / "checkpoints" / "last.ckpt")
    # Lightning finds the link by itself.
    module = make_module(target_dir, drafter=EagleFamily(feature_noise=0.1), num_steps=1, ema_decay=0.9)
    keeper = ModelCheckpoint(tmp_path / "checkpoints", save_last=True, save_top_k=0, every_n_train_steps=3)
    validation = TreeDecodeValidation(num_prompts=2, max_new_tokens=8, draft_length=2)
    trainer = make_trainer(
        tmp_path,
        max_epochs=3,
        val_check_interval=0.5,
        enable_checkpointing=True,
        callbacks=[validation, keeper, ResumeValidation(), Preemption()],
    )
    trainer.fit(module, CacheDataModule(cache, val_fraction=0.2, tokens_per_batch=20))
    assert trainer.global_step == 12
    assert_same_weights(module, undisturbed[1])


def test_sigterm_under_slurm_saves_and_leaves_the_queue_alone(
    target_dir: Path, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    notes = slurm_job(tmp_path, monkeypatch)
    run_until_told(tmp_path, target_dir, cache, Tell("batch_start", 6))
    assert step_of(tmp_path / "checkpoints" / "last.ckpt") == 7
    assert not notes.exists()


def test_sigterm_can_be_the_signal_to_requeue(
    target_dir: Path, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    notes = slurm_job(tmp_path, monkeypatch)
    environment = SLURMEnvironment(requeue_signal=signal.SIGTERM)
    run_until_told(tmp_path, target_dir, cache, Tell("batch_start", 6), plugins=[environment])
    assert notes.read_text() == "requeue 4711\n"


def test_a_requeue_that_fails_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    notes = slurm_job(tmp_path, monkeypatch, exit_code=1)
    monkeypatch.setenv("SLURM_ARRAY_JOB_ID", "12")
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "3")
    with pytest.warns(UserWarning, match=r"scontrol requeue 12_3 failed \(code 1: no such job\)"):
        requeue()
    assert notes.read_text() == "requeue 12_3\n"
    monkeypatch.setenv("PATH", "")
    with pytest.warns(UserWarning, match="No such file"):
        requeue()


def test_the_link_for_a_requeued_job_is_one_and_never_takes_the_place_of_a_file(tmp_path: Path) -> None:
    (tmp_path / "hpc_ckpt_2.ckpt").write_bytes(b"written by Lightning")
    link_for_requeue(tmp_path, str(tmp_path / "a" / "last.ckpt"))
    link_for_requeue(tmp_path, str(tmp_path / "b" / "last.ckpt"))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["hpc_ckpt_2.ckpt", "hpc_ckpt_3.ckpt"]
    assert os.readlink(tmp_path / "hpc_ckpt_3.ckpt") == "b/last.ckpt"
    assert (tmp_path / "hpc_ckpt_2.ckpt").read_bytes() == b"written by Lightning"
    link_for_requeue(Path("s3://bucket/run"), "s3://bucket/run/last.ckpt")
    (tmp_path / "hpc_ckpt_4-v1.ckpt").touch()
    link_for_requeue(tmp_path / "new", str(tmp_path / "last.ckpt"))
    assert os.readlink(tmp_path / "new" / "hpc_ckpt_1.ckpt") == "../last.ckpt"
    link_for_requeue(tmp_path, str(tmp_path / "c" / "last.ckpt"))
    assert os.readlink(tmp_path / "hpc_ckpt_3.ckpt") == "c/last.ckpt"
    with pytest.warns(UserWarning, match=r"cannot be made .*--ckpt_path last"):
        link_for_requeue(tmp_path / "hpc_ckpt_2.ckpt", str(tmp_path / "last.ckpt"))


def test_the_training_command_does_all_this_unasked(target_dir: Path, cache: Path, tmp_path: Path) -> None:
    cli = main(["fit", f"--config={tiny_config(tmp_path, target_dir, cache)}", "--trainer.max_steps=1"])
    kinds = [type(callback) for callback in cli.trainer.callbacks]
    assert kinds[-2:] == [ResumeValidation, Preemption]
    assert kinds.count(Preemption) == 1
