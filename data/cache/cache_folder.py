"""A cache while it is made, by one process or by many: what is there, what is missing, when it is whole.

Owns: the records of finished shards beside them, their gathering into the manifest, what is cleared away at the end.
Does not know: targets, how a shard's content is made, which process makes which.

While shards are being made, `shard-00003.json` beside `shard-00003.safetensors` says that the shard is whole. The manifest is
written at the beginning, incomplete, and at the end of each process with what is there by then. A process that is killed
leaves whole shards with their records and at most one that has none, which the next process makes again.
"""

import json
import shutil
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from draftsmith import provenance
from draftsmith.data.progress import progress
from draftsmith.data.shards.lengths import LENGTHS_FILE, write_lengths
from draftsmith.data.shards.manifest import MANIFEST_FILE, CacheIdentity, Manifest, ShardRecord, read_record
from draftsmith.data.shards.shards import ShardContent, check_digest, write_shard
from draftsmith.data.shared_work import in_turn
from draftsmith.files import atomic_write, is_abandoned, sha256_file
from draftsmith.json_rows import DROPPED_FILE, Dropped, dropped_lines

SURVEY_PREFIX = ".survey-"


class CacheFolder:
    """The folder that processes of one extraction share. What they change together they change in turn.

    Args:
        path: of the cache.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._listed: tuple[tuple[int, int], frozenset[str]] | None = None

    def check_place(self) -> None:
        """Check that a cache can be made here.

        Raises:
            ValueError: the place is a file, or a folder with anything else in it.
        """
        if self.path.exists() and not self.path.is_dir():
            raise ValueError(f"{self.path} is a file, but a folder is to be written there; name another folder")
        if not self.path.exists() or (self.path / MANIFEST_FILE).exists():
            return
        others = any(not path.name.startswith(".") for path in self.path.iterdir())
        # Looked for again: another rank may have begun the cache meanwhile.
        if others and not (self.path / MANIFEST_FILE).exists():
            raise ValueError(f"{self.path} is not empty and no cache; name another folder")

    def begin(self, empty: Manifest, dropped: Iterable[Dropped], source: Mapping[str, str]) -> None:
        """Write what the cache will be, unless it is there.

        Args:
            empty: the manifest of the cache before its first shard.
            dropped: rows that are no sample.
            source: what is read, with its sha256.

        Raises:
            ValueError: the folder holds another cache, or anything else.
        """
        with in_turn(self.path / MANIFEST_FILE):
            if (self.path / MANIFEST_FILE).exists():
                self._check_same(empty.identity)
            else:
                self.check_place()
                empty.save(self.path)
            if not (self.path / DROPPED_FILE).exists():
                atomic_write(self.path / DROPPED_FILE, dropped_lines(dropped))
            if not (self.path / provenance.FILE_NAME).exists():
                settings: dict[str, Any] = asdict(empty.identity)
                provenance.write(self.path, provenance.record("data extract", settings, source))

    def keep_good(self, numbers: Iterable[int]) -> set[int]:
        """Find which shards are there, byte by byte. Records of those that are not whole are dropped, so that they are made again.

        Args:
            numbers: of shards.

        Returns:
            Those of them that are there.
        """
        with in_turn(self.path / MANIFEST_FILE):
            there = self._records()
        wanted = {number: there[name] for number in numbers if (name := _name(number)) in there}
        bad = set()
        with progress(f"check {self.path}", len(wanted), "shards", brief=True) as advance:
            for number, record in wanted.items():
                if not self._is_good(record):
                    bad.add(number)
                advance(1)
        if bad:
            with in_turn(self.path / MANIFEST_FILE):
                manifest = Manifest.load(self.path)
                kept = [shard for shard in manifest.shards if shard.name not in map(_name, bad)]
                replace(manifest, lengths_sha256=None).with_shards(kept).save(self.path)
                for number in bad:
                    self._record_file(number).unlink(missing_ok=True)
        return wanted.keys() - bad

    def has(self, number: int) -> bool:
        """Whether some process has finished this shard: its record lies beside it or, from a gathering on, in the manifest.

        Args:
            number: of the shard.

        Returns:
            True where it is finished.
        """
        return self._record_file(number).exists() or _name(number) in self._gathered()

    def add(self, number: int, content: ShardContent) -> None:
        """Write a shard, then its record.

        Args:
            number: of the shard.
            content: its tensors.

        Raises:
            OSError: the disk does not take them.
        """
        record = write_shard(self.path / _name(number), content)
        atomic_write(self._record_file(number), json.dumps(asdict(record)) + "\n", clear=False)

    def gather(self, lengths: Sequence[int]) -> Manifest:
        """Put every shard that is there into the manifest; with the last one, the cache is complete.

        Args:
            lengths: tokens of each sample of the whole cache.

        Returns:
            The manifest as it is now.
        """
        with in_turn(self.path / MANIFEST_FILE):
            manifest = Manifest.load(self.path).with_shards(self._records().values())
            if manifest.complete:
                write_lengths(self.path, lengths)
                manifest = replace(manifest, lengths_sha256=sha256_file(self.path / LENGTHS_FILE))
            manifest.save(self.path)
            if manifest.complete:
                self._clear()
        return manifest

    def _check_same(self, wanted: CacheIdentity) -> None:
        differences = Manifest.load(self.path).differences(wanted)
        if differences:
            raise ValueError(
                f"{self.path} holds another cache ({'; '.join(differences)}); name another folder or delete this one"
            )

    def _records(self) -> dict[str, ShardRecord]:
        """By name, to be called in turn: those in the manifest, and those beside their shards."""
        listed = {shard.name: shard for shard in Manifest.load(self.path).shards}
        beside = (read_record(path) for path in self.path.glob("shard-*.json"))
        return listed | {record.name: record for record in beside}

    def _gathered(self) -> frozenset[str]:
        """The shards in the manifest, which is read again only when it has been replaced: it may list tens of thousands."""
        status = (self.path / MANIFEST_FILE).stat()
        version = status.st_ino, status.st_mtime_ns
        if self._listed is None or self._listed[0] != version:
            self._listed = version, frozenset(shard.name for shard in Manifest.load(self.path).shards)
        return self._listed[1]

    def _is_good(self, record: ShardRecord) -> bool:
        try:
            check_digest(self.path / record.name, record)
        except ValueError:
            return False
        return True

    def _record_file(self, number: int) -> Path:
        return (self.path / _name(number)).with_suffix(".json")

    def _clear(self) -> None:
        """Takes away what only the making needed, and what killed processes left of half-written shards.

        What living ones are writing stays: ranks of another world size may not be done.
        """
        killed = filter(is_abandoned, self.path.glob(".shard-*.partial-*"))
        for leftover in [*self.path.glob("shard-*.json"), *killed]:
            leftover.unlink(missing_ok=True)
        for survey in self.path.glob(f"{SURVEY_PREFIX}*"):
            shutil.rmtree(survey, ignore_errors=True)


def _name(number: int) -> str:
    return f"shard-{number:05d}.safetensors"
