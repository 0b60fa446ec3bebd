"""Stages that run side by side: each in a process of its own and on one thread, as soon as the stages that it needs are done.

Owns which stage runs when, which ones an earlier run did, and how long each took. Does not know what a stage does.
"""

import itertools
import json
import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch

from draftsmith.files import atomic_write


@dataclass(frozen=True)
class Stage:
    """A part of the work, which runs once.

    Attributes:
        name: distinct for each.
        make: does it; what it leaves behind are files.
        after: the names of the stages whose files it needs.
    """

    name: str
    make: Callable[[], object]
    after: tuple[str, ...] = ()


def needed(plan: Sequence[Stage], names: Collection[str]) -> list[Stage]:
    """The stages of these names and all that they wait for, in the order of the plan."""
    wanted, by_name = set(names), {stage.name: stage for stage in plan}
    while more := {name for each in wanted for name in by_name[each].after} - wanted:
        wanted |= more
    return [stage for stage in plan if stage.name in wanted]


@dataclass(frozen=True)
class Stages:
    """Runs each stage once, and notes how long it took. What a stage prints is in `work/logs`."""

    work: Path

    def run(self, plan: Sequence[Stage], at_once: int | None = None) -> None:
        """Runs the stages that no earlier run did.

        A stage gets a copy of this process (`fork`), so that it need not load the libraries again.

        Args:
            plan: the earlier a stage is in it, the earlier it begins, once those are done that it needs.
            at_once: how many may run at the same time; None for as many as there are cores.

        Raises:
            SystemExit: a stage ended with an error. The others are stopped, and the next run continues them.
            ValueError: a stage needs one that is neither done nor in the plan, or that waits for it.
        """
        started, running = time.perf_counter(), dict[Any, tuple[Stage, BaseProcess]]()
        waiting = [stage for stage in plan if not self._is_done(stage.name)]
        try:
            while waiting or running:
                ready = [stage for stage in waiting if all(map(self._is_done, stage.after))]
                for stage in ready[: (at_once or os.cpu_count() or 1) - len(running)]:
                    waiting.remove(stage)
                    process = self._begin(stage)
                    running[process.sentinel] = stage, process
                if not running:
                    raise ValueError(
                        f"{waiting[0].name} waits for {', '.join(waiting[0].after)}, which nothing brings about"
                    )
                for sentinel in wait(list(running)):
                    stage, process = running.pop(sentinel)
                    process.join()
                    self._check(stage, process)
        finally:
            _end([process for _, process in running.values()])
            self._add_to_clock(time.perf_counter() - started)

    def check_plan(self, plan: dict[str, Any]) -> None:
        """Refuses a folder that was begun with another plan; its stages would not fit together."""
        file, text = self.work / "plan.json", json.dumps(plan, indent=1) + "\n"
        if not file.is_file():
            atomic_write(file, text)
        elif file.read_text() != text:
            sys.exit(
                f"{self.work} was begun with another scale, other counts or other settings ({file}); remove it, or name another --work"
            )

    def spent(self) -> dict[str, dict[str, float]]:
        """Seconds of all stages done so far, by the clock and of a processor."""
        return {stamp.name: json.loads(stamp.read_text()) for stamp in sorted((self.work / ".done").iterdir())}

    def clock_seconds(self) -> float:
        """How long all runs in this folder took by the clock."""
        file = self.work / "clock.json"
        return float(json.loads(file.read_text())["seconds"]) if file.is_file() else 0.0

    def _is_done(self, name: str) -> bool:
        return (self.work / ".done" / name).is_file()

    def _begin(self, stage: Stage) -> BaseProcess:
        process = multiprocessing.get_context("fork").Process(target=self._once, args=(stage,), name=stage.name)
        process.start()
        return process

    def _check(self, stage: Stage, process: BaseProcess) -> None:
        """Says how long a stage took, or quotes what it printed last."""
        if process.exitcode:
            said = self._log(stage).read_text(errors="replace")[-3000:]
            sys.exit(f"stage {stage.name} ended with {process.exitcode}:\n{said}")
        spent = json.loads((self.work / ".done" / stage.name).read_text())
        print(f"{stage.name}: {spent['seconds']:.0f} s, {spent['processor_seconds']:.0f} s of a processor", flush=True)

    def _log(self, stage: Stage) -> Path:
        return self.work / "logs" / f"{stage.name}.log"

    def _once(self, stage: Stage) -> None:
        """In the process of the stage: does it, and leaves a stamp with its seconds."""
        self._log(stage).parent.mkdir(parents=True, exist_ok=True)
        with self._log(stage).open("a") as log:
            os.dup2(log.fileno(), 1)
            os.dup2(log.fileno(), 2)
        sys.stdout = sys.stderr = os.fdopen(1, "w", buffering=1, closefd=False)
        signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(1))  # so that it ends what it started itself
        torch.set_num_threads(1)
        stamp, begun = self.work / ".done" / stage.name, self.work / ".begun" / stage.name
        # A stage that was stopped resumes where it was, so the seconds of its earlier starts are its own too.
        spent = json.loads(begun.read_text()) if begun.is_file() else {"seconds": 0.0, "processor_seconds": 0.0}
        started, busy = time.perf_counter(), _processor_seconds()
        try:
            stage.make()
        finally:
            spent["seconds"] += time.perf_counter() - started
            spent["processor_seconds"] += _processor_seconds() - busy
            begun.parent.mkdir(parents=True, exist_ok=True)
            atomic_write(begun, json.dumps(spent) + "\n")
        stamp.parent.mkdir(parents=True, exist_ok=True)
        begun.rename(stamp)

    def _add_to_clock(self, seconds: float) -> None:
        self.work.mkdir(parents=True, exist_ok=True)
        atomic_write(self.work / "clock.json", json.dumps({"seconds": self.clock_seconds() + seconds}) + "\n")


def _end(processes: Sequence[BaseProcess]) -> None:
    """Asks until they end.

    The handler of the signal raises. Python drops what is raised in a finaliser or a callback of its garbage
    collection, so a request can get lost.
    """
    for asked in itertools.count():
        for process in processes:
            process.terminate() if asked < 3 else process.kill()
        for process in processes:
            process.join(5.0)
        if not any(process.is_alive() for process in processes):
            return


def _processor_seconds() -> float:
    own = os.times()
    return own.user + own.system + own.children_user + own.children_system
