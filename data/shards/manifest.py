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

from draftsmith.data.shards.shard_names import SHA256_RULE, SHARD_NAME_RULE, is_sha256, is_shard_name
from draftsmith.files import atomic_write
from draftsmith.json_text import parse_json, parse_json_object

SCHEMA = "draftsmith.hidden_states/1"
MANIFEST_FILE = "manifest.json"
# How the target was spelled does not matter where its fingerprint agrees; its vocabulary follows from it.
_NOT_COMPARED = ("target", "target_revision", "vocab_size")
_REMEDY = "copy the cache again, or extract it again"
# Fields that caches of earlier versions lack.
_LATER = frozenset(
    {
        "lengths_sha256",
        "target_quantization",
        "vocab_size",
        "template_args",
        "states_from",
        "trained_on",
        "trained_tokens",
        "read_tokens",
        "modes",
    }
)
_STORED_DTYPES = ("float32", "bfloat16", "float16", "float64", "float8_e4m3")
_LARGEST_COUNT = 2**62


@dataclass(frozen=True)
class CacheIdentity:
    """Everything that must agree for two extractions to give the same cache.

    Whatever fixes which samples share a batch is here too, since rounding depends on it.

    Attributes:
        target: the name that the target was asked for by.
        target_revision: the hub's revision, or None.
        target_fingerprint: of its weights.
        tokenizer_fingerprint: of its tokenizer.
        template_fingerprint: of the chat template, its name and its variables.
        layers: names, such as `last.pre_norm` and `layer.12.output`.
        hidden_size: D, of the target.
        dtype: the stored one.
        target_dtype: the one that the target ran in.
        source: sha256 of the texts.
        split: the only one that was kept, or None.
        mask: how the loss mask was found.
        max_length: samples were cut to this many tokens.
        local_horizon: greedy tokens kept after each position (0: none).
        shard_mib: size of a shard in MiB.
        batch_tokens: tokens of one forward, padding included.
        target_quantization: what its weights were made (`8bit`, `4bit`), or None.
        vocab_size: token ids that the target can read; None in caches of earlier versions.
        template_args: the chat template's variables as JSON, None for none.
        states_from: `engine` where a serving engine computed the states; None where the target ran here.
        trained_on: what of the assistant's turns is trained on, in words; None for everything.
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
    states_from: str | None = None
    trained_on: str | None = None


@dataclass(frozen=True)
class ShardRecord:
    """One shard file, and how much is in it.

    Attributes:
        name: of the file.
        sha256: of the file, hex.
        num_bytes: of the file.
        num_samples: in it.
        num_tokens: of all its samples.
        num_labelled: tokens that are trained on.
    """

    name: str
    sha256: str
    num_bytes: int
    num_samples: int
    num_tokens: int
    num_labelled: int


@dataclass(frozen=True)
class Manifest:
    """A cache as a whole.

    Attributes:
        identity: what the cache depends on.
        num_samples: of the whole cache.
        num_tokens: of all samples.
        num_labelled: tokens that are trained on.
        num_dropped: rows and samples that were dropped.
        num_cut: samples that were cut.
        complete: True from the last shard on.
        lengths_sha256: of `lengths.safetensors`; None while the cache is incomplete and where an earlier version made it.
        shards: in order; while the cache is being made, some may be missing between them.
        trained_tokens: tokens that are trained on, by kind (`replies`, `tool_calls`, `thoughts`); empty in caches of earlier versions.
        read_tokens: tokens of the assistant that are only read, by kind.
        modes: tokens that are trained on, by mode of their sample, which may be in several.
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
    trained_tokens: dict[str, int] = field(default_factory=dict)
    read_tokens: dict[str, int] = field(default_factory=dict)
    modes: dict[str, int] = field(default_factory=dict)

    def with_shards(self, shards: Iterable[ShardRecord]) -> "Manifest":
        """Replace the shards.

        Args:
            shards: their records, in any order.

        Returns:
            The manifest with these and no other, put in order.
        """
        ordered = tuple(sorted(shards, key=lambda shard: (len(shard.name), shard.name)))
        return replace(self, shards=ordered, complete=sum(s.num_samples for s in ordered) == self.num_samples)

    def save(self, folder: Path) -> None:
        """Write the manifest, atomically. It holds nothing of this run (no time): the same input, the same bytes.

        Args:
            folder: of the cache.
        """
        atomic_write(folder / MANIFEST_FILE, json.dumps({"schema": SCHEMA} | asdict(self), indent=2) + "\n")

    @classmethod
    def load(cls, folder: Path) -> "Manifest":
        """Read and check the manifest of a cache.

        Args:
            folder: of the cache.

        Returns:
            The manifest.

        Raises:
            ValueError: a missing folder or manifest, bad JSON, another schema, or fields that are missing, unknown or of another type. Also
                for a complete cache whose shards do not hold its samples.
        """
        path = folder / MANIFEST_FILE
        if not path.is_file():
            raise ValueError(
                f"{folder} is no hidden-state cache: it has no {MANIFEST_FILE}; make one with `draftsmith data extract`"
            )
        return cls.parse(path.read_bytes(), str(path))

    @classmethod
    def parse(cls, content: bytes, place: str) -> "Manifest":
        """As `load`, of the bytes of a manifest.

        Args:
            content: the bytes.
            place: what errors call them.

        Returns:
            The manifest.

        Raises:
            ValueError: as `load`.
        """
        entries = parse_json(content, place, "extract the cache again")
        if not isinstance(entries, dict) or entries.get("schema") != SCHEMA:
            schema = entries.get("schema") if isinstance(entries, dict) else type(entries).__name__
            raise ValueError(
                f"{place} has the schema {schema!r:.80}, this version reads {SCHEMA!r}; extract the cache again"
            )
        del entries["schema"]
        given = _build(cls, entries, place)
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
            recorded, summed = getattr(self, name), sum(getattr(shard, name) for shard in self.shards)
            if recorded != summed:
                raise ValueError(f"{place}: {name} is {recorded}, but its shards have {summed} in all; {_REMEDY}")

    def differences(self, wanted: CacheIdentity) -> list[str]:
        """Find which settings of this cache differ from the wanted ones.

        Args:
            wanted: what another extraction would make.

        Returns:
            Differences as `name: here 'a', wanted 'b'`.
        """
        names = [f.name for f in fields(CacheIdentity) if f.name not in _NOT_COMPARED]
        pairs = [(name, getattr(self.identity, name), getattr(wanted, name)) for name in names]
        return [f"{name}: here {here!r}, wanted {want!r}" for name, here, want in pairs if here != want]


def read_record(path: Path) -> ShardRecord:
    """Read one shard's record from a file of its own, beside the shard.

    Args:
        path: of the record.

    Returns:
        The record.

    Raises:
        ValueError: it is damaged or names another shard.
    """
    remedy = "delete it and run the extraction again"
    content = parse_json_object(path.read_bytes(), str(path), remedy)
    record: ShardRecord = _build(ShardRecord, content, str(path), remedy=remedy)
    if record.name != path.with_suffix(".safetensors").name:
        raise ValueError(f"{path}: name is {record.name!r}, which is another shard's; {remedy}")
    return record


def _build(kind: type, content: Any, place: str, remedy: str = _REMEDY, within: str = "") -> Any:
    """Make a dataclass of an object; `within` goes before the names of its fields.

    Raises:
        ValueError: a field is missing or unknown, or breaks its rule.
    """
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


def _are_counts(value: object) -> bool:
    return isinstance(value, dict) and all(map(_is_count, value.values()))


def _are_texts(value: object) -> bool:
    return (
        isinstance(value, list)
        and all(isinstance(text, str) and text for text in value)
        and len(set(value)) == len(value)
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
    dict[str, int]: (_are_counts, "an object of whole numbers, 0 or more"),
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
