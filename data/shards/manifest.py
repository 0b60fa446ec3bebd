"""`manifest.json` of a hidden-state cache: what the features are, whose they are, and what each shard must look like.

Owns: the manifest's fields and their checks. Does not know: tensors, targets, how shards are made.
"""

import itertools
import json
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from draftsmith.files import atomic_write
from draftsmith.outside import SHA256_RULE, SHARD_NAME_RULE, is_sha256, is_shard_name, parse_json, parse_json_object

SCHEMA = "draftsmith.hidden_states/1"
MANIFEST_FILE = "manifest.json"
# How the target was spelled does not matter where its fingerprint agrees; its vocabulary follows from it.
_NOT_COMPARED = ("target", "target_revision", "vocab_size")
_REMEDY = "copy the cache again, or extract it again"
# Fields that caches of earlier versions lack.
_LATER = frozenset({"lengths_sha256", "target_quantization", "vocab_size", "template_args"})
_STORED_DTYPES = ("float32", "bfloat16", "float16", "float64", "float8_e4m3")
_LARGEST_COUNT = 2**62


@dataclass(frozen=True)
class CacheIdentity:
    """Everything that must agree for two extractions to give the same cache.

    `layers` are names (`last.pre_norm`, `layer.12.output`). `dtype` is the stored one, `target_dtype` the one the
    target ran in, `target_quantization` what its weights were made (`8bit`, `4bit`, or None). `template_args` are the chat template's
    variables as JSON, None for none; `template_fingerprint` covers them. `source` is the sha256 of
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
    vocab_size: int | None = None
    template_args: str | None = None


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
        return cls.parse(path.read_bytes(), str(path))

    @classmethod
    def parse(cls, content: bytes, place: str) -> "Manifest":
        """As `load`, of the bytes of a manifest; `place` is what errors call it."""
        found = parse_json(content, place, "extract the cache again")
        if not isinstance(found, dict) or found.get("schema") != SCHEMA:
            schema = found.get("schema") if isinstance(found, dict) else type(found).__name__
            raise ValueError(
                f"{place} has the schema {schema!r:.80}, this version reads {SCHEMA!r}; extract the cache again"
            )
        del found["schema"]
        given = _build(cls, found, place)
        identity = _build(CacheIdentity, given.identity, place, within="identity.")
        identity = replace(identity, layers=tuple(identity.layers))
        shards = tuple(
            _build(ShardRecord, shard, place, within=f"shards[{number}].") for number, shard in enumerate(given.shards)
        )
        manifest: Manifest = replace(given, identity=identity, shards=shards)
        manifest._check_shards(place)
        manifest._check_complete(place)
        return manifest

    def _check_shards(self, place: str) -> None:
        for number, shard in enumerate(self.shards):
            if not 1 <= shard.num_samples <= shard.num_tokens or shard.num_labelled > shard.num_tokens:
                raise ValueError(
                    f"{place}: shards[{number}] has num_samples {shard.num_samples}, num_tokens {shard.num_tokens} and num_labelled "
                    f"{shard.num_labelled}; a shard has a sample or more, each of a token or more; {_REMEDY}"
                )
        names = [shard.name for shard in self.shards]
        for number, (first, second) in enumerate(itertools.pairwise(names), start=1):
            if (len(first), first) >= (len(second), second):
                raise ValueError(
                    f"{place}: shards[{number}].name is {second!r} behind {first!r}; shards are in order and each is there once; {_REMEDY}"
                )

    def _check_complete(self, place: str) -> None:
        if not self.complete:
            return
        there = sum(shard.num_samples for shard in self.shards)
        if there != self.num_samples:
            raise ValueError(
                f"{place}: complete is true, but its {len(self.shards)} shards hold {there} of {self.num_samples} samples; {_REMEDY}"
            )
        for name in ("num_tokens", "num_labelled"):
            told, summed = getattr(self, name), sum(getattr(shard, name) for shard in self.shards)
            if told != summed:
                raise ValueError(f"{place}: {name} is {told}, but its shards have {summed} in all; {_REMEDY}")

    def differences(self, wanted: CacheIdentity) -> list[str]:
        """Which settings of this cache differ from the wanted ones, as `name: here 'a', wanted 'b'`."""
        names = [f.name for f in fields(CacheIdentity) if f.name not in _NOT_COMPARED]
        pairs = [(name, getattr(self.identity, name), getattr(wanted, name)) for name in names]
        return [f"{name}: here {here!r}, wanted {want!r}" for name, here, want in pairs if here != want]


def read_record(path: Path) -> ShardRecord:
    """One shard's record from a file of its own, beside the shard. Raises ValueError when it is damaged or names another shard."""
    remedy = "delete it and run the extraction again"
    content = parse_json_object(path.read_bytes(), str(path), remedy)
    record: ShardRecord = _build(ShardRecord, content, str(path), remedy=remedy)
    if record.name != path.with_suffix(".safetensors").name:
        raise ValueError(f"{path}: name is {record.name!r}, which is another shard's; {remedy}")
    return record


def _build(kind: type, content: Any, place: str, remedy: str = _REMEDY, within: str = "") -> Any:
    """Raises ValueError unless `content` has the fields of a dataclass and each keeps its rule; `within` goes before their names."""
    names = {f.name for f in fields(kind)}
    if not isinstance(content, Mapping) or set(content) | (_LATER & names) != names:
        given = set(content) if isinstance(content, Mapping) else set()
        raise ValueError(
            f"{place}: {kind.__name__} lacks {sorted(names - given - _LATER)} and has unknown {sorted(given - names)!r:.200}"
            f"{within and ' in ' + within.rstrip('.')}; {remedy}"
        )
    for f in fields(kind):
        fits, rule = _FIELD_RULES.get(f.name) or _RULES[f.type]
        if f.name in content and not fits(content[f.name]):
            raise ValueError(f"{place}: {within}{f.name} is {content[f.name]!r:.80}, it must be {rule}; {remedy}")
    return kind(**content)


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value < math.inf


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < _LARGEST_COUNT


def _are_texts(value: object) -> bool:
    return (
        isinstance(value, list) and all(isinstance(one, str) and one for one in value) and len(set(value)) == len(value)
    )


_Rule = tuple[Callable[[Any], bool], str]
# What JSON must hold for a field of each type that occurs here; what is within objects and lists is built, and checked, by itself.
_RULES: dict[Any, _Rule] = {
    str: (lambda value: isinstance(value, str), "text"),
    str | None: (lambda value: value is None or isinstance(value, str), "text or null"),
    int: (_is_count, "a whole number, 0 or more"),
    int | None: (lambda value: value is None or _is_count(value), "a whole number, 0 or more, or null"),
    float: (_is_number, "a number, 0 or more"),
    bool: (lambda value: isinstance(value, bool), "true or false"),
    tuple[str, ...]: (_are_texts, "a list of texts, each once"),
    tuple[ShardRecord, ...]: (lambda value: isinstance(value, list), "a list of objects"),
    CacheIdentity: (lambda value: isinstance(value, dict), "an object"),
}
# Fields with a rule beyond their type.
_FIELD_RULES: dict[str, _Rule] = {
    "name": (is_shard_name, f"text: {SHARD_NAME_RULE}"),
    "sha256": (is_sha256, f"text of {SHA256_RULE}"),
    "lengths_sha256": (lambda value: value is None or is_sha256(value), f"text or null: {SHA256_RULE}"),
    "dtype": (lambda value: value in _STORED_DTYPES, f"text: one of {', '.join(_STORED_DTYPES)}"),
    "hidden_size": (lambda value: _is_count(value) and value > 0, "a whole number, 1 or more"),
}
