"""Progress of long work: one bar in a terminal, a line every 30 seconds in a log file. Done, rate, time left."""

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, Task, TextColumn, TimeRemainingColumn
from rich.table import Column
from rich.text import Text

from draftsmith.escapes import visible

LINE_EVERY_SECONDS = 30.0


class _RateColumn(ProgressColumn):
    def __init__(self, unit: str) -> None:
        super().__init__(table_column=Column(no_wrap=True))
        self.unit = unit

    def render(self, task: Task) -> Text:
        """The speed so far, in units a second."""
        speed = task.finished_speed or task.speed
        return Text("" if speed is None else f"{speed:,.1f} {self.unit}/s")


class ProgressMeter:
    """Shows on stderr how much of some work is done, how fast it goes and how long it will take.

    A terminal shows a bar. Anything else gets a line every 30 seconds, whether a unit was done since or not, and one at the end.

    Args:
        title: what is done.
        total: how many units there are; None where nobody knows.
        unit: what they are called, in the plural.
        done: units that an earlier run did. They count towards the total, not towards the rate.
        brief: the work is mostly over in a moment. The bar goes when it ends, and a log file gets lines only where it takes longer.
    """

    def __init__(self, title: str, total: int | None, unit: str, done: int = 0, brief: bool = False) -> None:
        self._title, self._total, self._unit, self._before = visible(title), total, unit, done
        self._has_to_end = not brief
        self._now, self._note = 0, ""
        self._started = self._last_line = time.perf_counter()
        self._lines = threading.Lock()
        self._ended = threading.Event()
        self._watch: threading.Thread | None = None
        self._console = Console(stderr=True)
        self._is_terminal = self._console.is_terminal
        columns = (
            TextColumn("{task.description}", markup=False, table_column=Column(no_wrap=True)),
            BarColumn(bar_width=20),
            MofNCompleteColumn(table_column=Column(no_wrap=True)),
            _RateColumn(unit),
            TimeRemainingColumn(table_column=Column(no_wrap=True)),
            TextColumn(
                "{task.fields[note]}", markup=False, table_column=Column(no_wrap=True, overflow="ellipsis", ratio=1)
            ),
        )
        self._bar = Progress(
            *columns, console=self._console, expand=True, transient=brief, disable=not self._console.is_terminal
        )
        self._task = self._bar.add_task(self._title, total=total, completed=done, note="")

    def start(self) -> None:
        """Show the bar, and start the clock."""
        self._started = self._last_line = time.perf_counter()
        self._bar.start()
        if not self._is_terminal:
            self._ended.clear()
            self._watch = threading.Thread(target=self._print_while_nothing_ends, name="progress", daemon=True)
            self._watch.start()

    def advance(self, count: int, note: str | None = None) -> None:
        """Count units that are done.

        Args:
            count: how many more.
            note: follows the figures until the next one replaces it.
        """
        self._now += count
        if note is not None:
            self._note = visible(note)
        if self._is_terminal:
            self._bar.update(self._task, advance=count, note=self._note)
        elif time.perf_counter() - self._last_line >= LINE_EVERY_SECONDS:
            self._print_if_due()

    def say(self, note: str) -> None:
        """Tell what is done now, without counting a unit.

        Args:
            note: follows the figures until the next one replaces it.
        """
        self.advance(0, note)

    def forgo(self, count: int) -> None:
        """Take units off the total that nobody needs any more.

        Args:
            count: how many.
        """
        if self._total is not None and count:
            self._total -= count
            self._bar.update(self._task, total=self._total)

    def stop(self) -> None:
        """Leave the bar as it is; in a log file a last line says how long the work took."""
        self._bar.stop()
        self._ended.set()
        if self._watch is not None:
            self._watch.join()
            self._watch = None
        if not self._is_terminal and self._now and self._has_to_end:
            self._print(f"{self._now:,} {self._unit} in {time.perf_counter() - self._started:.1f} s")

    def _print_while_nothing_ends(self) -> None:
        """Lines of a log file while a unit takes long: the bar of a terminal moves by itself, a log file does not."""
        while not self._ended.wait(max(0.0, self._last_line + LINE_EVERY_SECONDS - time.perf_counter())):
            self._print_if_due()

    def _print_if_due(self) -> None:
        with self._lines:
            now = time.perf_counter()
            if now - self._last_line >= LINE_EVERY_SECONDS:
                self._last_line, self._has_to_end = now, True
                self._print(self._state())

    def _state(self) -> str:
        """Examples: `96 of 2,400 replies, 16.3 replies/s, 141 s left`; before the first one `0 of 2,400 replies, 30 s so far`."""
        seconds = time.perf_counter() - self._started
        done = self._before + self._now
        parts = [f"{done:,} {self._unit}" if self._total is None else f"{done:,} of {self._total:,} {self._unit}"]
        if not self._now:
            parts.append(f"{seconds:,.0f} s so far")
        else:
            rate = self._now / max(1e-9, seconds)
            parts.append(f"{rate:,.1f} {self._unit}/s")
            if self._total is not None:
                parts.append(f"{(self._total - done) / max(1e-9, rate):,.0f} s left")
        return ", ".join([*parts, self._note] if self._note else parts)

    def _print(self, text: str) -> None:
        self._console.print(f"{self._title}: {text}", markup=False, highlight=False, soft_wrap=True)


@contextmanager
def metered(title: str, total: int | None, unit: str, done: int = 0, brief: bool = False) -> Iterator[ProgressMeter]:
    """Show a `ProgressMeter` around a block that tells it more than how much is done.

    Args:
        title: what is done.
        total: how many units there are; None where nobody knows.
        unit: what they are called, in the plural.
        done: units that an earlier run did.
        brief: the work is mostly over in a moment; see `ProgressMeter`.

    Yields:
        The meter.
    """
    meter = ProgressMeter(title, total, unit, done, brief)
    meter.start()
    try:
        yield meter
    finally:
        meter.stop()


@contextmanager
def progress(
    title: str, total: int | None, unit: str, done: int = 0, brief: bool = False
) -> Iterator[Callable[[int], None]]:
    """Show a `ProgressMeter` around a block.

    Args:
        title: what is done.
        total: how many units there are; None where nobody knows.
        unit: what they are called, in the plural.
        done: units that an earlier run did.
        brief: the work is mostly over in a moment; see `ProgressMeter`.

    Yields:
        A function that takes how many more units are done.
    """
    with metered(title, total, unit, done, brief) as meter:
        yield meter.advance
