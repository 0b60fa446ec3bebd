"""What belongs to each row stays with it when others end."""

from __future__ import annotations

from dataclasses import fields, replace

import pytest
import torch
from transformers.generation import LogitsProcessorList

from draftsmith.decode.processors import RequestText
from draftsmith.decode.rows import Rows, seen_tokens
from draftsmith.models import EarlyStop
from draftsmith.models.slots.slot_cache import KeptRows
from draftsmith.models.tree.early_stop import StopState
from draftsmith.models.tree.noise import keys_at


def rows_of(numbers: list[int]) -> Rows:
    """Rows whose every part tells their number."""
    number_B = torch.tensor(numbers)
    stop = StopState(EarlyStop(0.3), 4, number_B.float(), number_B.float())
    texts = [RequestText([number], LogitsProcessorList()) for number in numbers]
    return Rows(number_B, number_B, torch.eye(8, dtype=torch.bool)[number_B], texts, stop)


def test_every_part_of_a_row_is_selected_with_it() -> None:
    """Keeping 1, 2, 4 of five rows moves row 4 into place 0."""
    kept = rows_of([0, 1, 2, 3, 4]).select(KeptRows.of([1, 2, 4], torch.device("cpu")))
    expected = rows_of([4, 1, 2])
    assert kept.texts == expected.texts
    assert kept.stop is not None
    assert kept.stop.threshold_B.tolist() == kept.stop.rate_B.tolist() == [4.0, 1.0, 2.0]
    for name in {field.name for field in fields(Rows)} - {"texts", "stop"}:
        torch.testing.assert_close(getattr(kept, name), getattr(expected, name))


@pytest.mark.parametrize("name", [field.name for field in fields(Rows)])
def test_a_part_that_is_not_needed_stays_away(name: str) -> None:
    rows = replace(rows_of([0, 1, 2]), **{name: None})
    assert getattr(rows.select(KeptRows.of([1], torch.device("cpu"))), name) is None


def test_noise_belongs_to_the_output_position() -> None:
    """Output position 0 has place 0 below a request's keys, however long its prompt is; the second key of a position is the first of the
    next. The token behind a prompt is position 0; in the first cycle, the prompt alone is cached, and position 1 follows."""
    lengths_B = torch.tensor([3, 5])
    rows = Rows(torch.tensor([11, 12]), torch.tensor([21, 22]))
    rows.number_keys(lengths_B)
    for first in (0, 1):
        places_BP = torch.arange(2).expand(2, -1) + first
        here, later = rows.choice_keys(lengths_B, 2), rows.choice_keys(lengths_B + 1, 1)
        assert here is not None
        assert later is not None
        assert here.tolist() == keys_at(torch.tensor([[11], [12]]), places_BP).tolist()
        assert here[:, 1:].tolist() == later.tolist()
        cycle = rows.cycle_keys(lengths_B, 5)
        assert cycle is not None
        at_cycle_B = keys_at(torch.tensor([21, 22]), torch.tensor(first))
        assert cycle.tolist() == keys_at(at_cycle_B[:, None], torch.arange(5)).tolist()
        rows.number_keys(torch.tensor(-1))
    assert rows.cycle_keys(lengths_B, 0) is None


def test_padding_is_no_token_of_a_text() -> None:
    seen_BV = seen_tokens(torch.tensor([[3, 4, 0], [5, 6, 7]]), torch.tensor([2, 3]), vocab_size=8)
    rows = Rows(choice_keys_B=torch.tensor([1, 2]), seen_BV=seen_BV)
    rows.emit(torch.tensor([[1, 0], [2, 3]]), torch.tensor([1, 2]), torch.tensor([True, True]))
    assert [row.nonzero().flatten().tolist() for row in seen_BV] == [[1, 3, 4], [2, 3, 5, 6, 7]]
    rows.emit(torch.tensor([[4, 0], [2, 4]]), torch.tensor([1, 2]), torch.tensor([True, False]))
    emitted = [[1, 3, 4], [2, 3, 5, 6, 7]]
    assert [row.nonzero().flatten().tolist() for row in seen_BV] == emitted, "an idle row emits nothing"
