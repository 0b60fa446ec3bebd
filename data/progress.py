"""One progress bar for all long work of this folder: done, rate, time left."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, Task, TextColumn, TimeRemainingColumn
from rich.text import Text

from draftsmith.foreign import visible


class _RateColumn(ProgressColumn):
    def __init__(self, unit: str) -> None:
        super().__init__()
        self.unit = unit

    def render(self, task: Task) -> Text:
        """The speed so far, in units a second."""
        speed = task.finished_speed or task.speed
        return Text("" if speed is None else f"{speed:,.1f} {self.unit}/s")


@contextmanager
def progress(title: str, total: int, unit: str, done: int = 0) -> Iterator[Callable[[int], None]]:
    """Shows a bar on stderr; the value is a function that takes how many more units are done.

    `done` units were done by an earlier run: they count towards the total, not towards the rate. Where stderr is no
    terminal, one line is printed at the end instead.
    """
    console = Console(stderr=True)
    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        _RateColumn(unit),
        TimeRemainingColumn(),
    )
    started = time.perf_counter()
    now = 0
    with Progress(*columns, console=console, disable=not console.is_terminal) as bar:
        task = bar.add_task(visible(title), total=total, completed=done)

        def advance(count: int) -> None:
            nonlocal now
            now += count
            bar.advance(task, count)

        yield advance
    if not console.is_terminal and now:
        console.print(
            f"{visible(title)}: {now:,} {unit} in {time.perf_counter() - started:.1f} s", markup=False, highlight=False
        )
