"""A campaign of small changes to a cache: each is served as the good cache is, or refused by an error that names the file."""

from __future__ import annotations

import copy
import json
import random
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from caches import LAYER, Tensors, spoil_shard, write_small_cache
from hypothesis import HealthCheck, given, seed, settings
from hypothesis import strategies as st

from draftsmith.data.cache.reader import HiddenStateCache

ODD: list[Any] = [None, True, False, 0, 1, -1, 3, 2**63, 10**400, 0.5, -0.0, float("nan"), float("inf")]
ODD += ["", "x", "../x", [], {}, [0], ["x"], "\ud800", "a\0b"]
ODD += ["shard-00000.safetensors", "0" * 64, "bfloat16", "float8_e4m3"]
NUMBERS = [-(2**31), -1, 0, 1, 3, 5, 99, 100, 101, 2**31 - 1, float("nan"), float("inf"), -float("inf"), 0.25]


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_small_cache(tmp_path_factory.mktemp("good"))


@pytest.fixture(scope="module")
def eight_bits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_small_cache(tmp_path_factory.mktemp("eight"), "float8_e4m3")


def served(folder: Path) -> list[Any]:
    """Everything that a cache serves."""
    cache = HiddenStateCache(folder)
    texts = [(ids.tolist(), mask.tolist()) for ids, mask in cache.texts(range(len(cache)))]
    samples = [
        (s.id, s.input_ids.tolist(), s.loss_mask.tolist(), s.hidden[LAYER].tolist(), s.greedy_ids.tolist())  # type: ignore[union-attr]
        for s in cache
    ]
    return [texts, samples, cache.sample_lengths]


def served_or_refused(folder: Path, name: str) -> list[Any] | None:
    """What a cache serves, or None where an error refuses it that names a file of the cache."""
    refused = ""
    try:
        return served(folder)
    except ValueError as error:
        refused = str(error)
    assert str(folder / name) in refused
    return None


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Where in some JSON a value stands."""
    if path:
        yield path
    for key in value if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ():
        yield from places(value[key], (*path, key))


def mutate(manifest: Any, draw: random.Random) -> None:
    """One small change at a random place."""
    path = draw.choice(list(places(manifest)))
    place = manifest
    for key in path[:-1]:
        place = place[key]
    value = place[path[-1]]
    choices = ["odd", "remove", "copy"]
    if isinstance(value, int) and not isinstance(value, bool):
        choices += ["step"] * 3
    if isinstance(value, list) and len(value) > 1:
        choices += ["swap", "twice", "drop"]
    match draw.choice(choices):
        case "odd":
            place[path[-1]] = copy.deepcopy(draw.choice(ODD))
        case "remove":
            del place[path[-1]]
        case "copy":
            target = manifest if isinstance(place, list) else place
            target["stray"] = value
        case "step":
            place[path[-1]] = value + draw.choice([-1, 1])
        case "swap":
            value[0], value[-1] = value[-1], value[0]
        case "twice":
            value.append(copy.deepcopy(value[-1]))
        case "drop":
            value.pop()


@seed(20)
@settings(max_examples=250, deadline=None, database=None, suppress_health_check=list(HealthCheck))
@given(number=st.integers(0, 2**32))
def test_a_changed_manifest_is_served_alike_or_refused(good: Path, number: int) -> None:
    expected = served(good)
    path = good / "manifest.json"
    whole = path.read_text()
    draw = random.Random(number)
    manifest = json.loads(whole)
    for _ in range(draw.choice([1, 1, 2])):
        mutate(manifest, draw)
    try:
        path.write_text(json.dumps(manifest))
        assert served_or_refused(good, "") in (None, expected)
    finally:
        path.write_text(whole)


@pytest.mark.parametrize(
    "text", ["", "[", "[]", "7", '{"schema": 1}', "\ufeff{}", "[" * 100_000, "1" * 5000, '{"a": NaN}']
)
def test_what_is_no_manifest_is_refused(good: Path, tmp_path: Path, text: str) -> None:
    folder = Path(shutil.copytree(good, tmp_path / "cache"))
    (folder / "manifest.json").write_text(text)
    assert served_or_refused(folder, "manifest.json") is None


def spoil(tensors: Tensors, draw: random.Random) -> None:
    """One change that leaves the file a safetensors file."""
    name = draw.choice(sorted(tensors))
    tensor = tensors[name]
    match draw.choice(["number", "number", "number", "shorter", "longer", "dtype", "remove", "rename"]):
        case "number" if tensor.dtype != torch.bool:
            flat = tensor.flatten()
            value = draw.choice(NUMBERS)
            if not tensor.is_floating_point():
                value = 7 if value != value or abs(value) == float("inf") else int(value)
            flat[draw.randrange(len(flat))] = value
            tensors[name] = flat.reshape(tensor.shape)
        case "number":
            tensors[name] = tensor ^ True
        case "shorter":
            tensors[name] = tensor[:-1]
        case "longer":
            tensors[name] = torch.cat([tensor, tensor[:1]])
        case "dtype":
            tensors[name] = tensor.to(draw.choice([torch.float32, torch.int64, torch.uint8, torch.float16]))
        case "remove":
            del tensors[name]
        case "rename":
            tensors[draw.choice(["stray", "hidden.other", "scale.other"])] = tensors.pop(name)


@pytest.mark.parametrize("kind", ["good", "eight_bits"])
@seed(21)
@settings(max_examples=120, deadline=None, database=None, suppress_health_check=list(HealthCheck))
@given(number=st.integers(0, 2**32))
def test_a_changed_shard_is_served_as_it_is_or_refused(request: pytest.FixtureRequest, kind: str, number: int) -> None:
    """What a change can still be is other ids, states or scales that are in range: the cache serves those as the file has them."""
    folder: Path = request.getfixturevalue(kind)
    draw = random.Random(number)
    shard = draw.randrange(3)
    files = {path: path.read_bytes() for path in folder.iterdir()}
    try:
        spoil_shard(folder, lambda tensors: spoil(tensors, draw), shard)
        found = served_or_refused(folder, f"shard-0000{shard}.safetensors")
        if found is None:
            return
        texts, samples, _ = found
        assert [(ids, mask) for _, ids, mask, _, _ in samples] == texts
        for _, ids, _, states, greedy in samples:
            assert len(ids) == len(states) == len(greedy)
            assert all(0 <= token < 100 for token in [*ids, *(one for row in greedy for one in row)])
            assert bool(torch.tensor(states).isfinite().all())
    finally:
        for path, content in files.items():
            path.write_bytes(content)


@seed(22)
@settings(max_examples=60, deadline=None, database=None, suppress_health_check=list(HealthCheck))
@given(number=st.integers(0, 2**32))
def test_a_shard_with_a_changed_byte_is_refused(good: Path, number: int) -> None:
    draw = random.Random(number)
    path = good / draw.choice(["shard-00000.safetensors", "shard-00002.safetensors", "lengths.safetensors"])
    content = path.read_bytes()
    try:
        changed = bytearray(content)
        changed[draw.randrange(len(changed))] ^= 1 << draw.randrange(8)
        path.write_bytes(bytes(changed))
        with pytest.raises(ValueError, match=path.name):
            served(good)
    finally:
        path.write_bytes(content)
