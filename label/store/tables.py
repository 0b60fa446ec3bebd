"""The tables of a label store.

Owns their columns, their version, and the rule that rows are only ever added: what changes an earlier row's meaning is another row.
SQLite itself refuses to alter or delete one. A new version only adds tables, so that a store of an older one loses nothing. Knows nothing
of what is asked of the tables.
"""

from __future__ import annotations

from sqlalchemy import DDL, Column, Float, ForeignKey, Integer, MetaData, String, Table, Text, UniqueConstraint, event

VERSION = 2
METADATA = MetaData()

# Times are UTC in ISO form with microseconds: text that sorts, the same in every database.
ABOUT = Table(
    "about",
    METADATA,
    Column("version", Integer, primary_key=True, autoincrement=False),
    Column("at", String(32), nullable=False),
)
ITEMS = Table(
    "items",
    METADATA,
    Column("number", Integer, primary_key=True),
    Column("id", String(255), nullable=False, unique=True),
    Column("messages", Text, nullable=False),
    Column("response", Text, nullable=False),
    Column("model", Text, nullable=False),
    Column("licence", Text, nullable=False),
    Column("source", Text, nullable=False),
    Column("author", String(255), nullable=False),
    Column("at", String(32), nullable=False),
)
TOKENS = Table(
    "tokens",
    METADATA,
    Column("number", Integer, primary_key=True),
    Column("item", ForeignKey("items.number"), nullable=False),
    Column("tokenizer", String(64), nullable=False),
    Column("offsets", Text, nullable=False),
    Column("author", String(255), nullable=False),
    Column("at", String(32), nullable=False),
    UniqueConstraint("item", "tokenizer"),
)
# The log: an entry is a label, or takes an earlier one back (`undoes`), which can happen once.
ENTRIES = Table(
    "entries",
    METADATA,
    Column("number", Integer, primary_key=True),
    Column("item", ForeignKey("items.number"), nullable=False, index=True),
    Column("undoes", ForeignKey("entries.number"), unique=True),
    Column("verdict", String(16)),
    Column("labelled_by", String(255), nullable=False, index=True),
    Column("how", String(16)),
    Column("error_start", Integer),
    Column("error_end", Integer),
    Column("checked_start", Integer),
    Column("checked_end", Integer),
    Column("note", Text, nullable=False),
    Column("seconds", Float),
    Column("author", String(255), nullable=False),
    Column("at", String(32), nullable=False),
)
# Version 2. The entries whose label says that a whole step is wrong (`steps.is_step`).
STEPS = Table(
    "steps",
    METADATA,
    Column("entry", ForeignKey("entries.number"), primary_key=True, autoincrement=False),
    Column("author", String(255), nullable=False),
    Column("at", String(32), nullable=False),
)
# Version 2. Whose labels of the item do not count beside the label of an entry.
REPLACED = Table(
    "replaced",
    METADATA,
    Column("entry", ForeignKey("entries.number"), primary_key=True, autoincrement=False),
    Column("labelled_by", String(255), primary_key=True),
    Column("author", String(255), nullable=False),
    Column("at", String(32), nullable=False),
)
# Version 2. The right answer to what an item asks, as its source has it.
REFERENCES = Table(
    "reference_answers",
    METADATA,
    Column("item", ForeignKey("items.number"), primary_key=True, autoincrement=False),
    Column("reference", Text, nullable=False),
    Column("author", String(255), nullable=False),
    Column("at", String(32), nullable=False),
)
# An item has one seat, or two where it is meant for two annotators. A seat that is given up is taken again under the
# next `turn`; the first constraint is what keeps two processes from giving one seat to two annotators.
ASSIGNMENTS = Table(
    "assignments",
    METADATA,
    Column("number", Integer, primary_key=True),
    Column("item", ForeignKey("items.number"), nullable=False),
    Column("seat", Integer, nullable=False),
    Column("turn", Integer, nullable=False),
    Column("annotator", String(255), nullable=False, index=True),
    Column("at", String(32), nullable=False),
    UniqueConstraint("item", "seat", "turn"),
    UniqueConstraint("item", "annotator"),
)
RELEASES = Table(
    "releases",
    METADATA,
    Column("assignment", ForeignKey("assignments.number"), primary_key=True),
    Column("reason", Text, nullable=False),
    Column("author", String(255), nullable=False),
    Column("at", String(32), nullable=False),
)

for _table in METADATA.sorted_tables:
    for _action in ("UPDATE", "DELETE"):
        _rule = DDL(
            f"CREATE TRIGGER {_table.name}_no_{_action.lower()} BEFORE {_action} ON {_table.name} "
            f"BEGIN SELECT RAISE(ABORT, 'rows of {_table.name} are never changed or deleted'); END"
        )
        event.listen(_table, "after_create", _rule.execute_if(dialect="sqlite"))
