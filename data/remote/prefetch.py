"""Files that will be needed soon, fetched in threads and held until they are not.

Owns the threads and what they hold. Does not know: networks, caches, which files there are.
"""

import threading
from collections.abc import Callable, Sequence

from draftsmith.data.remote.node_folder import HeldFile

_POLL_SECONDS = 0.2


class Prefetcher:
    """Holds what will be needed soon, fetching it in threads.

    Args:
        hold: gives a file by its number, or None where it cannot be had now.
        threads: fetches at a time.
    """

    def __init__(self, hold: Callable[[int], HeldFile | None], threads: int = 4) -> None:
        self._hold, self._num_threads = hold, threads
        self._changed = threading.Condition()
        self._wanted: list[int] = []
        self._files: dict[int, HeldFile] = {}
        self._busy: set[int] = set()
        self._given_up: set[int] = set()
        self._put_off: set[int] = set()
        self._threads: list[threading.Thread] = []
        self._closed = False

    def want(self, numbers: Sequence[int]) -> None:
        """Replace what is wanted; what is no longer wanted is released.

        Args:
            numbers: of files, most urgent first.
        """
        with self._changed:
            self._wanted, self._given_up = list(numbers), set()
            for number in set(self._files) - set(numbers):
                self._files.pop(number).release()
            self._changed.notify_all()
            if not self._threads and numbers and not self._closed:
                self._threads = [threading.Thread(target=self._work, daemon=True) for _ in range(self._num_threads)]
                for thread in self._threads:
                    thread.start()

    def close(self) -> None:
        """End the threads, once they are through with what they fetch, and release everything."""
        with self._changed:
            self._closed = True
        self.want([])

    def abandon(self) -> None:
        """Release what a forked process has inherited; the threads, and whoever had the lock, are its parent's."""
        for file in self._files.values():
            file.release()
        self._files = {}

    @property
    def fetched(self) -> set[int]:
        """The numbers of the files that are there."""
        with self._changed:
            return set(self._files)

    def _work(self) -> None:
        while (number := self._next()) is not None:
            file = None
            try:
                file = self._hold(number)
            except (ValueError, OSError):
                with self._changed:  # whoever needs it tries again, and gets the error
                    self._given_up.add(number)
            with self._changed:
                self._busy.discard(number)
                if file is None:
                    self._put_off.add(number)
                elif number in self._wanted:
                    self._files[number] = file
                    continue
            if file is not None:
                file.release()

    def _next(self) -> int | None:
        with self._changed:
            while not self._closed:
                settled = self._files.keys() | self._busy | self._given_up
                for number in self._wanted:
                    if number not in settled and number not in self._put_off:
                        self._busy.add(number)
                        return number
                # What another process is fetching comes again after the others.
                self._changed.wait(_POLL_SECONDS if self._put_off else None)
                if self._put_off:
                    self._put_off.clear()
                    self._changed.notify_all()
        return None
