"""Seats: who looks at which item.

Owns what a seat is and how it is written down. An item has one, or two where two annotators are meant to see it, and each seat holds one
annotator until it is given up. Knows nothing of what a label says.
"""

from __future__ import annotations

from dataclasses import dataclass

from sqlalchemy import Connection, insert

from draftsmith.label.store.database import now
from draftsmith.label.store.tables import ASSIGNMENTS


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
