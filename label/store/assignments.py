"""Who is to look at which item.

Owns seats: an item has one, or two where two annotators are meant to see it, and each seat holds one annotator until it is
given up. Knows nothing of what a label says.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Set
from dataclasses import dataclass

from sqlalchemy import Connection, insert, select

from draftsmith.label.store.database import now
from draftsmith.label.store.tables import ASSIGNMENTS, RELEASES


@dataclass(frozen=True)
class Seat:
    """One annotator's place at one item.

    Attributes:
        item: its number.
        seat: 0, or 1 where two annotators are meant to see the item.
        turn: how many had this seat before and left.
        annotator: their name.
    """

    item: int
    seat: int
    turn: int
    annotator: str


def open_seat(connection: Connection, annotator: str, labelled: Set[tuple[int, str]]) -> Seat | None:
    """The first item assigned to an annotator that they have neither labelled nor released.

    Args:
        connection: of a transaction.
        annotator: their name.
        labelled: (item, author) of the labels that count.
    """
    held, _ = _seats(connection)
    return next((seat for seat in held if seat.annotator == annotator and (seat.item, annotator) not in labelled), None)


def free_seats(
    connection: Connection, annotator: str, wanted: Mapping[int, int], labelled: Set[tuple[int, str]]
) -> Iterator[Seat]:
    """The free seats for an annotator, one an item, none of them taken yet.

    Args:
        connection: of a transaction.
        annotator: their name.
        wanted: the number of seats of each item, in the order in which items are offered.
        labelled: (item, author) of the labels that count and leave nothing to find out. One by an author without a seat fills a seat too:
            an imported item that is labelled needs nobody.

    Yields:
        seats, in the order of `wanted`.
    """
    held, released = _seats(connection)
    sitting = {(held_seat.item, held_seat.annotator) for held_seat in held}
    known_to = {known.item for known in [*held, *released] if known.annotator == annotator}
    known_to |= {item for item, author in labelled if author == annotator}
    filled = Counter(item for item, _ in sitting | set(labelled))
    taken = {(held_seat.item, held_seat.seat) for held_seat in held}
    turns = Counter((left.item, left.seat) for left in released)
    for item, num_seats in wanted.items():
        if item in known_to or filled[item] >= num_seats:
            continue
        for seat in range(num_seats):
            if (item, seat) not in taken:
                yield Seat(item, seat, turns[item, seat], annotator)
                break


def seats_of(connection: Connection, annotator: str) -> tuple[list[Seat], list[Seat]]:
    """The seats that an annotator holds, and those that they gave up, oldest first.

    Args:
        connection: of a transaction.
        annotator: their name.
    """
    held, released = _seats(connection)
    return [seat for seat in held if seat.annotator == annotator], [
        seat for seat in released if seat.annotator == annotator
    ]


def take(connection: Connection, seat: Seat) -> None:
    """Writes the assignment down.

    Args:
        connection: of a transaction.
        seat: to take.

    Raises:
        sqlalchemy.exc.IntegrityError: another process has just taken this seat.
    """
    values = {"item": seat.item, "seat": seat.seat, "turn": seat.turn, "annotator": seat.annotator, "at": now()}
    connection.execute(insert(ASSIGNMENTS).values(values))


def _seats(connection: Connection) -> tuple[list[Seat], list[Seat]]:
    """Seats that are held, and those that were given up, oldest first."""
    rows = connection.execute(
        select(ASSIGNMENTS, RELEASES.c.assignment.label("release"))
        .join(RELEASES, RELEASES.c.assignment == ASSIGNMENTS.c.number, isouter=True)
        .order_by(ASSIGNMENTS.c.number)
    ).all()
    held: list[Seat] = []
    released: list[Seat] = []
    for row in rows:
        seat = Seat(row.item, row.seat, row.turn, row.annotator)
        (held if row.release is None else released).append(seat)
    return held, released
