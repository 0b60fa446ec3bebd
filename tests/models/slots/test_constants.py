"""Small tensors of counts: remembered by everybody, held by captured graphs, and of use to whoever trains."""

from __future__ import annotations

import gc
import weakref
from concurrent.futures import ThreadPoolExecutor
from threading import Event
from time import sleep

import pytest
import torch
from torch import Tensor

from draftsmith.models.slots import constants
from draftsmith.models.slots.constants import counting, holding, made_once

CPU = torch.device("cpu")


def test_the_same_arguments_give_the_same_tensor() -> None:
    assert counting(5, CPU) is counting(5, CPU)
    assert counting(5, CPU) is not counting(6, CPU)
    assert counting(5, CPU).tolist() == [0, 1, 2, 3, 4]


def test_a_graph_holds_what_the_memory_forgets(monkeypatch: pytest.MonkeyPatch) -> None:
    """A captured graph reads a constant at its address, also after many other constants were asked for."""
    monkeypatch.setattr(constants, "_MOST", 2)
    made = made_once(lambda count: torch.arange(count))
    held, lost = weakref.ref(made(1)), weakref.ref(made(2))
    with holding() as asked:
        assert made(1).tolist() == [0]
    for count in range(3, 6):
        made(count)
    gc.collect()
    assert lost() is None
    assert held() is asked[0]


def test_the_memory_forgets_what_was_not_asked_for_longest(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "_MOST", 2)
    calls: list[int] = []

    @made_once
    def made(count: int) -> Tensor:
        calls.append(count)
        return torch.arange(count)

    for count in (1, 2, 1, 3, 1, 2):
        made(count)
    assert calls == [1, 2, 3, 2]


def test_what_is_made_within_a_capture_is_not_remembered() -> None:
    """A capture records how a tensor is made and computes nothing, so nobody else may read it."""
    made = made_once(lambda count: torch.arange(count))
    with holding() as asked:
        inside = made(4)
    assert asked[0] is inside
    assert made(4) is not inside
    assert made(4) is made(4)


def test_what_a_model_asks_for_in_inference_mode_can_be_trained_with() -> None:
    made = made_once(lambda count: torch.arange(count))
    with torch.inference_mode():
        index = made(3)
    weights = torch.ones(3, requires_grad=True)
    (weights.gather(0, index) * 2).sum().backward()
    assert weights.grad is not None
    assert weights.grad.tolist() == [2.0] * 3


def test_threads_that_ask_at_the_same_time_get_what_they_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """A small memory forgets all the time, also what another thread has just looked up."""
    monkeypatch.setattr(constants, "_MOST", 1)
    turn = Event()

    class Interrupted(int):
        """An argument whose comparison lets another thread run in the middle of a look-up."""

        def __eq__(self, other: object) -> bool:
            turn.set()
            sleep(0.001)
            return int(self) == other

        __hash__ = int.__hash__

    made = made_once(lambda count: torch.arange(int(count)))

    def others() -> None:
        while not over.is_set():
            turn.wait(0.01)
            made(3)
            made(4)

    over = Event()
    with ThreadPoolExecutor(2) as threads:
        waiting = [threads.submit(others) for _ in range(2)]
        try:
            for _ in range(40):
                assert made(Interrupted(3)).tolist() == [0, 1, 2]
        finally:
            over.set()
        for each in waiting:
            each.result()
