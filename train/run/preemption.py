"""Runs that a scheduler stops: a checkpoint at once, a clean end, and a resumed run that is the same run.

Owns: which signals stop a run, where all processes stop together, and the checkpoint of that moment. Does not know: models, data, SLURM's
commands (`slurm`), which validation is due (`resume_validation`), how a checkpoint reaches the disk.

Built on Lightning's public hooks. Two things that Lightning offers are not enough:

- Its own handling of SIGTERM (2.6) saves nothing and asks only rank 0 in training. In validation it looks at the signal only between
  batches. It broadcasts from inside the handler, whatever other collectives are under way.
- `Trainer.should_stop` makes Lightning validate before the run ends, and waits for `min_epochs`. Validation may take longer than a
  scheduler's grace. So the run ends by SIGTERMException, from the hooks after a step and around a validation.

The thread that ends a process is ours for the same reason: one that waits in a collective hears no signal in Python.
"""

from __future__ import annotations

import itertools
import os
import signal
import threading
import time
import weakref
from pathlib import Path
from types import FrameType
from typing import Any, Literal

import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import ModelCheckpoint
from pytorch_lightning.utilities.exceptions import SIGTERMException
from pytorch_lightning.utilities.rank_zero import rank_zero_info, rank_zero_warn

from draftsmith.train.run.accumulation import accumulations, check_accumulation
from draftsmith.train.run.resume_validation import ResumeValidation
from draftsmith.train.run.slurm import link_for_requeue, requeue, requeue_signal

__all__ = ["Preemption", "ResumeValidation"]

Request = Literal["stop", "requeue"]
Phase = Literal["training", "validating", "leaving", "ended"]


class Preemption(pl.Callback):
    """SIGTERM saves a checkpoint and ends the run with exit code 0; SLURM's requeue signal also puts the job back into the queue.

    In training all processes stop at the end of the same optimiser step, whichever of them got the signal, and save there. Validation
    may take longer than the grace. So the checkpoint is written before it begins. A process that gets the signal in validation leaves
    at once, and the resumed run repeats that validation. The checkpoint goes where ModelCheckpoint keeps its last one, so that
    `--ckpt_path last` finds it. A step that this file holds already is not written again.

    Place it after the checkpoint callbacks, so that they still save at the step of the stop; `draftsmith train fit` does.

    Args:
        leave_after: seconds until a process that got the signal in validation, and still waits for others there, is ended.
        peers_after: seconds that a process waits for its own signal when validation fails because another process has left.

    Raises:
        ValueError: at the start of training, where a validation could fall inside an accumulation; see `check_accumulation`.
    """

    def __init__(self, leave_after: float = 15.0, peers_after: float = 5.0) -> None:
        self.leave_after, self.peers_after = leave_after, peers_after
        self._request: Request | None = None
        self._phase: Phase = "training"
        self._signals: dict[int, Request] = {}
        self._trainer: pl.Trainer | None = None
        self._step = self._saved_step = -1
        self._before: tuple[int, int] | None = None
        self._passed_on = False
        self._path = ""
        self._pipe: tuple[int, int] | None = None
        # Made when it is needed: callbacks are sent to processes that a strategy spawns, and locks cannot be.
        self._disarmed: threading.Event | None = None

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Learns which signals there are, before loaders start their processes."""
        if stage != "fit" or self._signals:
            return
        self._signals = {signal.SIGTERM: "stop"}
        if number := requeue_signal(trainer):
            self._signals[number] = "requeue"
        _shield_forks(weakref.ref(self))

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Takes the signals over from Lightning, which gives all of them back at the end of the fit.

        Raises:
            ValueError: the run could not be resumed exactly; see `check_accumulation`.
        """
        for num_accumulated in accumulations(trainer):
            check_accumulation(trainer, num_accumulated)
        # Lightning has noted a signal of the moments before; it would end this process alone, and without a checkpoint.
        self._request = "stop" if trainer.received_sigterm else None
        self._phase, self._trainer = "training", trainer
        self._step, self._saved_step, self._passed_on = trainer.global_step, -1, False
        if threading.current_thread() is not threading.main_thread():
            return
        for number in self._signals:
            signal.signal(number, self._handle)
        self._watch()

    def on_train_batch_start(self, trainer: pl.Trainer, *args: Any, **kwargs: Any) -> None:
        """Looks at the last checkpoint, to see later whether this step has written it."""
        keeper = _keeper(trainer)
        self._before = None if keeper is None else _identity(keeper.last_model_path)

    def on_train_batch_end(self, trainer: pl.Trainer, *args: Any, **kwargs: Any) -> None:
        """Where a run in training stops: after an optimiser step, never between the batches of one."""
        if trainer.global_step == self._step:
            return
        self._step = trainer.global_step
        if self._agree(trainer):
            self._save(trainer)
            self._leave()

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Writes the checkpoint that makes it safe to leave in the middle of a validation."""
        if trainer.state.fn != "fit" or trainer.sanity_checking:
            return
        self._save(trainer)
        if self._agree(trainer):
            self._leave()
        self._phase = "validating"
        if self._request:
            self._leave()

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """All processes continue, or none does."""
        if trainer.state.fn != "fit" or trainer.sanity_checking:
            return
        # From here on a signal only makes a note: a process that left after the others had been asked would strand them.
        self._phase = "leaving"
        stop = self._agree(trainer)
        self._phase = "training"
        if stop:
            # What validation found is kept, so that it need not be done again.
            self._saved_step, self._before = -1, _identity(self._path)
            self._save(trainer)
            self._leave()

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """A collective that fails in validation may mean that another process got the signal first and has left."""
        if trainer.world_size == 1 or self._phase not in ("validating", "leaving"):
            self._unwatch()
            return
        deadline = time.monotonic() + self.peers_after
        while self._request is None and time.monotonic() < deadline:
            time.sleep(0.05)
        if self._request:
            # No exception: Lightning would skip its own clean-up, and wait for loaders' workers that nobody has asked to end.
            self._report()
            os._exit(0)
        self._unwatch()

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Ends the watch."""
        self._signals, self._trainer = {}, None
        self._unwatch()

    def _handle(self, number: int, frame: FrameType | None) -> None:
        """The signal handler: makes a note, and leaves if nothing can be lost."""
        self._pass_on(number)
        if self._request != "requeue":
            self._request = self._signals.get(number, self._request)
        if self._phase == "validating":
            self._leave()

    def _pass_on(self, number: int) -> None:
        """Sends the signal to the processes that Lightning has started from this one, once."""
        launcher = None if self._passed_on or self._trainer is None else self._trainer.strategy.launcher
        self._passed_on = True
        if launcher is not None:
            launcher.kill(number)

    def _agree(self, trainer: pl.Trainer) -> bool:
        """Whether any process got a signal. Every process asks at the same place."""
        if trainer.world_size == 1:
            return self._request is not None
        if not trainer.strategy.reduce_boolean_decision(self._request is not None, all=False):
            return False
        wants_requeue = trainer.strategy.reduce_boolean_decision(self._request == "requeue", all=False)
        self._request = "requeue" if wants_requeue else "stop"
        return True

    def _save(self, trainer: pl.Trainer) -> None:
        """Writes the checkpoint of this step unless it is there; called by all processes together."""
        keeper = _keeper(trainer)
        if keeper is None or trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        path = _last_path(trainer, keeper)
        # Another machine may see a new file later: the first process decides for all.
        is_new = trainer.strategy.broadcast(_identity(path) not in (None, self._before))
        if self._saved_step != trainer.global_step and not is_new:
            # Before saving, because the keeper's state is part of the checkpoint.
            keeper.last_model_path = path
            trainer.save_checkpoint(path)
        self._saved_step, self._path = trainer.global_step, path

    def _leave(self) -> None:
        """Ends the process with exit code 0, by SIGTERMException."""
        self._report()
        raise SIGTERMException

    def _report(self) -> None:
        if self._phase == "ended":
            return
        self._phase = "ended"
        trainer = self._trainer
        assert trainer is not None
        if not self._path:
            rank_zero_warn(
                "stopped by a signal, and there is no checkpoint: the run keeps none (trainer.enable_checkpointing)"
            )
        elif self._request == "requeue" and trainer.is_global_zero:
            link_for_requeue(Path(trainer.default_root_dir), self._path)
            requeue()
        rank_zero_info(f"stopped by a signal: step {trainer.global_step} is in {self._path or 'no checkpoint'}")

    def _watch(self) -> None:
        """Starts the thread that ends a process which got the signal in validation, but waits in a collective and hears nothing."""
        self._unwatch()
        read, write = os.pipe()
        os.set_blocking(write, False)
        before = signal.set_wakeup_fd(write, warn_on_full_buffer=False)
        if before != -1:
            # An event loop has this already. Then only signals that Python gets to handle count.
            signal.set_wakeup_fd(before)
            os.close(read)
            os.close(write)
            return
        self._pipe, self._disarmed = (read, write), threading.Event()
        arguments = (read, self._disarmed)
        threading.Thread(target=self._end_if_stuck, args=arguments, name="preemption", daemon=True).start()

    def _unwatch(self) -> None:
        if self._pipe is None or self._disarmed is None:
            return
        if threading.current_thread() is threading.main_thread():
            signal.set_wakeup_fd(-1)
        self._disarmed.set()
        os.close(self._pipe[1])
        self._pipe = self._disarmed = None

    def _end_if_stuck(self, read: int, disarmed: threading.Event) -> None:
        while numbers := os.read(read, 1):
            request = self._signals.get(numbers[0])
            if request is None:
                continue
            # Here too: a process that waits in a collective may wait for those that need the signal.
            self._pass_on(numbers[0])
            if disarmed.wait(self.leave_after) or self._phase == "training":
                continue
            if self._phase != "ended":
                self._request = request if self._request is None else self._request
                self._report()
            # The checkpoint of this step was on the disk before validation began.
            os._exit(0)
        os.close(read)


def _shield_forks(preemption: weakref.ref[Preemption]) -> None:
    """Lets processes forked from here, such as loaders' workers, outlive the signals of a running fit.

    SLURM signals every process of a job. A worker that died of it would end the run before the checkpoint is written. Workers still end
    with their run, which asks them by other means.
    """

    def shield() -> None:
        running = preemption()
        if running is not None and running._signals:
            signal.pthread_sigmask(signal.SIG_BLOCK, running._signals)

    os.register_at_fork(after_in_child=shield)


def _keeper(trainer: pl.Trainer) -> ModelCheckpoint | None:
    """The callback whose folder `--ckpt_path last` searches: the one that keeps a last checkpoint, or else the first."""
    keepers = [callback for callback in trainer.checkpoint_callbacks if isinstance(callback, ModelCheckpoint)]
    return next((keeper for keeper in keepers if keeper.save_last), keepers[0] if keepers else None)


def _last_path(trainer: pl.Trainer, keeper: ModelCheckpoint) -> str:
    """Where the keeper writes its last checkpoint; a file of another run there is left alone.

    A path that a checkpoint names counts only if it lies in the keeper's own folder, because this run writes there.
    """
    if keeper.last_model_path and os.path.dirname(keeper.last_model_path) == str(keeper.dirpath):
        return keeper.last_model_path
    metrics = {"epoch": torch.tensor(trainer.current_epoch), "step": torch.tensor(trainer.global_step)}
    names = (
        keeper.format_checkpoint_name(metrics, keeper.CHECKPOINT_NAME_LAST, ver=version or None)
        for version in itertools.count()
    )
    return next(name for name in names if not keeper.file_exists(name, trainer))


def _identity(path: str) -> tuple[int, int] | None:
    """Differs between two files that had the same name in turn; None where there is none, or at an address with a scheme."""
    try:
        status = os.stat(path)
    except OSError:
        return None
    return status.st_ino, status.st_mtime_ns
