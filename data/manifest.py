"""`manifest.json` of a hidden-state cache: what the features are, whose they are, and what each shard must look like.

Owns: the manifest's fields and their checks. Does not know: tensors, targets, how shards are made.
"""

import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from draftsmith.files import atomic_write

SCHEMA = "draftsmith.hidden_states/1"
MANIFEST_FILE = "manifest.json"
# How the target was spelled does not matter where its fingerprint agrees.
_NAMES_ONLY = ("target", "target_revision")
_REMEDY = "copy the cache again, or extract it again"
# Fields that caches of earlier versions lack.
_LATER = frozenset({"lengths_sha256", "target_quantization"})


@dataclass(frozen=True)
class CacheIdentity:
    """Everything that must agree for two extractions to give the same cache.

    `layers` are names (`last.pre_norm`, `layer.12.output`). `dtype` is the stored one, `target_dtype` the one the
    target ran in, `target_quantization` what its weights were made (`8bit`, `4bit`, or None). `source` is the sha256 of
    the texts, `mask` says how the loss mask was found, `local_horizon` is the number of greedy tokens kept after each
    position (0: none). Whatever fixes which samples share a batch is here too, since rounding depends on it.
    """

    target: str
    target_revision: str | None
    target_fingerprint: str
    tokenizer_fingerprint: str
    template_fingerprint: str
    layers: tuple[str, ...]
    hidden_size: int
    dtype: str
    target_dtype: str
    source: str
    split: str | None
    mask: str
    max_length: int
    local_horizon: int
    shard_mib: float
    batch_tokens: int
    target_quantization: str | None = None


@dataclass(frozen=True)
class ShardRecord:
    """One shard file: its name, its sha256, its size in bytes, and how much is in it."""

    name: str
    sha256: str
    num_bytes: int
    num_samples: int
    num_tokens: int
    num_labelled: int


@dataclass(frozen=True)
class Manifest:
    """A cache as a whole; `complete` turns True with the last shard.

    `shards` are in order; while the cache is being made, some may be missing between them. `lengths_sha256` is that of
    `lengths.safetensors`, None while the cache is incomplete and where an earlier version made it.
    """

    identity: CacheIdentity
    num_samples: int
    num_tokens: int
    num_labelled: int
    num_dropped: int
    num_cut: int
    complete: bool = False
    lengths_sha256: str | None = None
    shards: tuple[ShardRecord, ...] = field(default=())

    def with_shard(self, shard: ShardRecord) -> "Manifest":
        """The manifest after one more shard."""
        return self.with_shards((*self.shards, shard))

    def with_shards(self, shards: Iterable[ShardRecord]) -> "Manifest":
        """The manifest with these shards and no other, put in order."""
        ordered = tuple(sorted(shards, key=lambda shard: (len(shard.name), shard.name)))
        return replace(self, shards=ordered, complete=sum(s.num_samples for s in ordered) == self.num_samples)

    def save(self, folder: Path) -> None:
        """Writes the manifest, atomically. It holds nothing of this run (no time): the same input, the same bytes."""
        atomic_write(folder / MANIFEST_FILE, json.dumps({"schema": SCHEMA} | asdict(self), indent=2) + "\n")

    @classmethod
    def load(cls, folder: Path) -> "Manifest":
        """Reads and checks the manifest of a cache.

        Raises ValueError for a missing folder or manifest, bad JSON, another schema, missing or unknown fields, fields of another
        type, and a complete cache whose shards do not hold its samples.
        """
        path = folder / MANIFEST_FILE
        if not path.is_file():
            raise ValueError(
                f"{folder} is no hidden-state cache: it has no {MANIFEST_FILE}; make one with `draftsmith data extract`"
            )
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
        except (json.JSONDecodeError, UnicodeDecodeError) as error:
            raise ValueError(f"{path} is not valid JSON ({error}); extract the cache again") from error
        if not isinstance(content, dict) or content.get("schema") != SCHEMA:
            found = content.get("schema") if isinstance(content, dict) else type(content).__name__
            raise ValueError(f"{path} has the schema {found!r}, this version reads {SCHEMA!r}; extract the cache again")
        del content["schema"]
        given = _build(cls, content, path)
        identity = _build(CacheIdentity, given.identity, path, place="identity.")
        identity = replace(identity, layers=tuple(identity.layers))
        shards = tuple(
            _build(ShardRecord, shard, path, place=f"shards[{number}].") for number, shard in enumerate(given.shards)
        )
        manifest: Manifest = replace(given, identity=identity, shards=shards)
        manifest._check_complete(path)
        return manifest

    def _check_complete(self, path: Path) -> None:
        there = sum(shard.num_samples for shard in self.shards)
        if self.complete and there != self.num_samples:
            raise ValueError(
                f"{path}: complete is true, but its {len(self.shards)} shards hold {there} of {self.num_samples} samples; {_REMEDY}"
            )

    def differences(self, wanted: CacheIdentity) -> list[str]:
        """Which settings of this cache differ from the wanted ones, as `name: here 'a', wanted 'b'`."""
        names = [f.name for f in fields(CacheIdentity) if f.name not in _NAMES_ONLY]
        pairs = [(name, getattr(self.identity, name), getattr(wanted, name)) for name in names]
        return [f"{name}: here {here!r}, wanted {want!r}" for name, here, want in pairs if here != want]


def read_record(path: Path) -> ShardRecord:
    """One shard's record from a file of its own. Raises ValueError when it is damaged."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not valid JSON ({error}); delete it and run the extraction again") from error
    record: ShardRecord = _build(ShardRecord, content, path, remedy="delete it and run the extraction again")
    return record


def _build(kind: type, content: Any, path: Path, remedy: str = _REMEDY, place: str = "") -> Any:
    """Raises ValueError unless `content` has the fields of a dataclass and each is of its type; `place` goes before their names."""
    names = {f.name for f in fields(kind)}
    if not isinstance(content, Mapping) or set(content) | (_LATER & names) != names:
        given = set(content) if isinstance(content, Mapping) else set()
        raise ValueError(
            f"{path}: {kind.__name__} lacks {sorted(names - given - _LATER)} and has unknown {sorted(given - names)}; "
            f"{remedy}"
        )
    for name, (fits, rule) in ((f.name, _RULES[f.type]) for f in fields(kind) if f.name in content):
        if not fits(content[name]):
            raise ValueError(f"{path}: {place}{name} is {content[name]!r:.80}, it must be {rule}; {remedy}")
    return kind(**content)


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _are_texts(value: object) -> bool:
    return isinstance(value, list) and all(isinstance(one, str) for one in value)


# What JSON must hold for a field of each type that occurs here; what is within objects and lists is built, and checked, by itself.
_RULES: dict[Any, tuple[Callable[[Any], bool], str]] = {
    str: (lambda value: isinstance(value, str), "text"),
    str | None: (lambda value: value is None or isinstance(value, str), "text or null"),
    int: (_is_count, "a whole number, 0 or more"),
    float: (_is_number, "a number"),
    bool: (lambda value: isinstance(value, bool), "true or false"),
    tuple[str, ...]: (_are_texts, "a list of texts"),
    tuple[ShardRecord, ...]: (lambda value: isinstance(value, list), "a list of objects"),
    CacheIdentity: (lambda value: isinstance(value, dict), "an object"),
}
