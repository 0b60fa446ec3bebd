"""Where a label store lies: a file or a database URL, opened for transactions that several processes may hold.

Owns connections, locks, the making of tables, their change from an older version, and the errors for a database's failures.
"""

from __future__ import annotations

import contextlib
import datetime
import sqlite3
from collections.abc import Iterator
from pathlib import Path

import sqlalchemy
from sqlalchemy import Connection, Engine, event, exc, func, insert, select
from sqlalchemy.engine import URL, make_url
from sqlalchemy.pool import ConnectionPoolEntry

from draftsmith.extras import install_command
from draftsmith.label.steps import is_step
from draftsmith.label.store.tables import ABOUT, ENTRIES, ITEMS, METADATA, STEPS, VERSION

PATIENCE_SECONDS = 30.0
_OPENED = "opened file"
# Drivers whose module and package go by different names.
_DRIVER_PACKAGES = {"psycopg2": "psycopg2-binary", "MySQLdb": "mysqlclient"}


class Conflict(ValueError):
    """Two writers wanted to add the same row; the second one's transaction left no trace."""


class Unavailable(ValueError):
    """The database could not do it now: another process holds it, its disk is full, its server is gone.

    Nothing was written, and the same call may succeed later.
    """


def now() -> str:
    """The time as the tables keep it."""
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="microseconds")


class Database:
    """A label store's tables.

    Args:
        place: a path (SQLite) or an SQLAlchemy URL.
        create: make the tables where there are none.
        patience_seconds: how long a writer waits for another one's transaction.
        with_first_rows: make missing tables in the first transaction that writes, and not before. If that one fails, no store stays behind.
            Until then nothing can be read.

    Raises:
        ValueError: there is no store and `create` is False; what is there is something else, or of another version; a wrong URL, or a
            driver that is not installed; the database cannot be reached or stays locked.
    """

    def __init__(
        self,
        place: str,
        create: bool = False,
        patience_seconds: float = PATIENCE_SECONDS,
        with_first_rows: bool = False,
    ) -> None:
        self.url = _url(place)
        self.name = self.url.render_as_string(hide_password=True) if "://" in place else place
        self._file = _file(self.url)
        self._made_file = self._file is not None and not self._file.exists()
        if self._file is not None and self._made_file:
            if not create:
                raise ValueError(f"{self.name} does not exist; check the path, or import answers into it first")
            self._file.parent.mkdir(parents=True, exist_ok=True)
        self.engine = self._engine(patience_seconds)
        self._is_ready = True
        with self._without_remains(), self.read() as connection:
            version = self._version(connection, create)
        self._is_ready = version == VERSION
        self._made_file = self._made_file and not self._is_ready
        if not self._is_ready and not (with_first_rows and version is None):
            with self.write():
                pass

    def _make_tables(self, connection: Connection) -> None:
        """Makes the tables that are missing; another process may have been quicker since we looked."""
        if self._file is not None and connection.info[_OPENED] != _identity(self._file):
            # Who made the file failed, and removed it while we waited; another process may have made one in its place since.
            self.engine.dispose()  # so that the next call opens the file that is there then
            raise Unavailable(f"{self.name} was removed by another process that failed; try again, nothing was written")
        version = self._version(connection, create=True)
        if version == VERSION:
            return
        METADATA.create_all(connection)
        if version is not None:
            _add_steps(connection)
        connection.execute(insert(ABOUT).values(version=VERSION, at=now()))

    def _engine(self, patience_seconds: float) -> Engine:
        sqlite = self.url.get_backend_name() == "sqlite"
        try:
            engine = sqlalchemy.create_engine(self.url, connect_args={"timeout": patience_seconds} if sqlite else {})
        except exc.NoSuchModuleError as error:
            raise ValueError(f"{self.name}: {error}; use a database that SQLAlchemy knows, or a path") from error
        except ModuleNotFoundError as error:
            driver = str(error.name)
            remedy = install_command(_DRIVER_PACKAGES.get(driver, driver))
            raise ValueError(f"{self.name} needs the Python package {driver}; run: {remedy}") from error
        if sqlite:
            event.listen(engine, "connect", _on_connect)
            event.listen(engine, "connect", self._note_file)
            event.listen(engine, "begin", _on_begin)
        return engine

    def _note_file(self, _connection: object, entry: ConnectionPoolEntry) -> None:
        """Notes which file a connection has opened: another one may lie at its path later."""
        entry.info[_OPENED] = None if self._file is None else _identity(self._file)

    def _version(self, connection: Connection, create: bool) -> int | None:
        """The version of the tables that are there; None where there are none yet."""
        tables = set(sqlalchemy.inspect(connection).get_table_names())
        if ABOUT.name in tables:
            version = connection.scalar(select(func.max(ABOUT.c.version)))
            if version is None or not 1 <= version <= VERSION:
                raise ValueError(
                    f"{self.name} is a label store of version {version}, this draftsmith reads versions 1 to {VERSION}; use "
                    "the draftsmith that wrote it, export its answers as JSON lines, and import those here"
                )
            return int(version)
        if tables:
            raise ValueError(f"{self.name} holds other tables ({', '.join(sorted(tables)[:5])}); name another database")
        if not create:
            raise ValueError(f"{self.name} holds no label store; check the name, or import answers into it first")
        return None

    @contextlib.contextmanager
    def read(self) -> Iterator[Connection]:
        """A transaction that sees one state of the store."""
        with self._errors_explained(), self.engine.begin() as connection:
            yield connection

    @contextlib.contextmanager
    def write(self) -> Iterator[Connection]:
        """A transaction whose rows are all there afterwards, on the disk, or none of them."""
        writing = self.engine.execution_options(writes=True)
        with self._without_remains(), self._errors_explained(), writing.begin() as connection:
            if not self._is_ready:
                self._make_tables(connection)
            yield connection
        self._is_ready, self._made_file = True, False

    @contextlib.contextmanager
    def _without_remains(self) -> Iterator[None]:
        """Removes the file that this process has made if nothing is in it when the block fails."""
        try:
            yield
        except BaseException:
            if self._file is not None and self._made_file:
                self.engine.dispose()
                _remove_empty(self._file)
            raise

    @contextlib.contextmanager
    def _errors_explained(self) -> Iterator[None]:
        try:
            yield
        except exc.IntegrityError as error:
            rule = "another process wrote the same row at the same moment, and nothing of this was written"
            raise Conflict(f"{self.name}: {error.orig}; {rule}; try again") from error
        except exc.OperationalError as error:
            raise Unavailable(f"{self.name}: {error.orig}; {_remedy(str(error.orig))}") from error
        except exc.DBAPIError as error:
            raise ValueError(f"{self.name}: {error.orig}; {_remedy(str(error.orig))}") from error
        except exc.TimeoutError as error:
            raise Unavailable(
                f"{self.name}: every connection to it is in use; try again, nothing was written"
            ) from error

    def close(self) -> None:
        """Closes all connections."""
        self.engine.dispose()


def _add_steps(connection: Connection) -> None:
    """Notes which labels of a store of version 1 call a whole step wrong."""
    errors = select(ENTRIES.c.number, ENTRIES.c.error_start, ENTRIES.c.error_end, ENTRIES.c.author, ITEMS.c.response)
    wrong = errors.join(ITEMS, ITEMS.c.number == ENTRIES.c.item).where(ENTRIES.c.error_start.is_not(None))
    steps = [
        {"entry": row.number, "author": row.author, "at": now()}
        for row in connection.execute(wrong)
        if is_step(row.response, (row.error_start, row.error_end))
    ]
    if steps:
        connection.execute(insert(STEPS), steps)


def _url(place: str) -> URL:
    if "://" not in place:
        return URL.create("sqlite", database=place)
    try:
        return make_url(place)
    except (exc.ArgumentError, ValueError) as error:
        raise ValueError("the store's URL cannot be read; write DIALECT://USER:PASSWORD@HOST/DATABASE") from error


def _file(url: URL) -> Path | None:
    named = url.get_backend_name() == "sqlite" and url.database not in (None, "", ":memory:")
    return Path(str(url.database)) if named else None


def _identity(file: Path) -> tuple[int, int] | None:
    """Which file lies at a path now; None for none."""
    try:
        about = file.stat()
    except FileNotFoundError:
        return None
    return about.st_dev, about.st_ino


def _remove_empty(file: Path) -> None:
    """Removes an empty database under the lock of its writers. Who waits for that lock looks for the file again."""
    unremovable = contextlib.suppress(sqlite3.Error, OSError)  # another process writes, or the folder cannot be written
    with unremovable, contextlib.closing(sqlite3.connect(file, timeout=0, isolation_level=None)) as connection:
        connection.execute("BEGIN IMMEDIATE")
        if file.stat().st_size == 0:
            file.unlink()


def database_file(place: str) -> Path | None:
    """Find the file that a store lies in.

    Args:
        place: a path (SQLite) or an SQLAlchemy URL.

    Returns:
        Its path; None for a database without a file here.

    Raises:
        ValueError: a wrong URL.
    """
    return _file(_url(place))


def _remedy(failure: str) -> str:
    if "locked" in failure:
        return "another process has held it for long; wait for it or end it, nothing was written"
    if "not a database" in failure or "malformed" in failure:
        return "the file is damaged or something else; name another, or restore it from a copy"
    return "check that the database is there and may be written"


def _on_connect(connection: object, _record: object) -> None:
    connection.isolation_level = None  # type: ignore[attr-defined]  # we begin ourselves: see _on_begin
    cursor = connection.cursor()  # type: ignore[attr-defined]
    cursor.execute("PRAGMA foreign_keys = ON")
    cursor.execute("PRAGMA synchronous = FULL")
    cursor.close()


def _on_begin(connection: Connection) -> None:
    # A writer that first reads and then upgrades its lock can meet another one doing the same, and both would fail.
    writes = connection.get_execution_options().get("writes", False)
    connection.exec_driver_sql("BEGIN IMMEDIATE" if writes else "BEGIN")
