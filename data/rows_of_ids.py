"""Rows of token ids: exchanges that `data respond` wrote, and samples of other trainers.

Owns: the fields that hold ids, and which ids a row may have. Does not know: files, templates, what is trained on.
"""

from collections.abc import Mapping
from typing import Any

from draftsmith.data.chats.tokenized_samples import TokenizedSample, Turn
from draftsmith.json_rows import UnusableRow

_LARGEST_ID = 2**31 - 1


def turns_of(row: Mapping[str, Any], vocab_size: int | None = None) -> list[Turn] | None:
    """Read exchanges in token ids: `turns`, or one `prompt_ids` and `reply_ids`.

    Args:
        row: of a file of replies.
        vocab_size: of the target; None where nobody knows.

    Returns:
        The exchanges; None for a row without ids.

    Raises:
        UnusableRow: ids that are no whole numbers from 0 to below `vocab_size`, a `finish` that is no text, or a turn that lacks
            either list.
    """
    if row.get("prompt_ids") is not None and row.get("reply_ids") is not None:
        return [_turn(row, "", vocab_size)]
    turns = row.get("turns")
    if not isinstance(turns, list) or not any(isinstance(turn, Mapping) and "reply_ids" in turn for turn in turns):
        return None
    return [_turn(turn, f"turn {number}: ", vocab_size) for number, turn in enumerate(turns)]


def _turn(turn: Any, place: str, vocab_size: int | None) -> Turn:
    if not isinstance(turn, Mapping):
        raise UnusableRow(f"{place}{type(turn).__name__}, not an object")
    finish = turn.get("finish")
    if finish is not None and not isinstance(finish, str):
        raise UnusableRow(f"{place}finish is {finish!r:.80}, not text")
    prompt_ids, reply_ids = (token_ids(turn, field, vocab_size, place) for field in ("prompt_ids", "reply_ids"))
    return Turn(prompt_ids, reply_ids, finish or "")


def token_ids(row: Mapping[str, Any], field: str, vocab_size: int | None = None, place: str = "") -> list[int]:
    """Read a field of token ids.

    Args:
        row: of a file of replies.
        field: the field's name.
        vocab_size: of the target; None where nobody knows.
        place: goes before the message.

    Returns:
        The ids.

    Raises:
        UnusableRow: it is no list of whole numbers (true and 1.0 are none), or one is negative or not below `vocab_size`.
    """
    ids = row.get(field)
    if not isinstance(ids, list) or set(map(type, ids)) - {int}:
        raise UnusableRow(f"{place}{field} is no list of whole numbers")
    last = _LARGEST_ID if vocab_size is None else vocab_size - 1
    for token in (min(ids, default=0), max(ids, default=0)):
        if not 0 <= token <= last:
            raise UnusableRow(f"{place}{field} has the token id {token!s:.20}; ids go from 0 to {last}")
    return list(ids)


def sample_of_ids(row: Mapping[str, Any], sample_id: str, vocab_size: int | None) -> TokenizedSample:
    """Read a row of `input_ids` and `loss_mask`, as speculators and other trainers keep theirs.

    Args:
        row: of a file of samples.
        sample_id: its id.
        vocab_size: of the target; None where nobody knows.

    Returns:
        The sample.

    Raises:
        UnusableRow: ids that are none, or a mask that is not one 0 or 1 for each.
    """
    ids, mask = token_ids(row, "input_ids", vocab_size), row.get("loss_mask")
    if not isinstance(mask, list) or len(mask) != len(ids) or any(entry not in (0, 1) for entry in mask):
        raise UnusableRow(f"loss_mask is no list of {len(ids)} entries 0 or 1, one for each of input_ids")
    if not ids:
        raise UnusableRow("input_ids is empty")
    return TokenizedSample(sample_id, ids, [bool(entry) for entry in mask])


def turns_begun_anew(row: Mapping[str, Any]) -> list[int]:
    """Read which turns have prompts that need not continue the turn before.

    Args:
        row: of a file of replies.

    Returns:
        Numbers of turns, from 0.

    Raises:
        UnusableRow: anything but a list of numbers.
    """
    turns = row.get("begun_anew") or []
    if not isinstance(turns, list) or not all(type(number) is int for number in turns):
        raise UnusableRow(f"begun_anew is {turns!r:.80}; it is a list of turn numbers")
    return turns
