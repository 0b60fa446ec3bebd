"""Shards that agree with their sha256 and not with themselves, in a folder and behind a URL: refused, and named."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import fsspec
import pytest
import torch
from caches import LAYER, VOCAB, WIDTH, Tensors, change_manifest, spoil_lengths, spoil_shard, write_small_cache

from draftsmith.data.cache.reader import HiddenStateCache
from draftsmith.data.remote.remote_folder import Retry
from draftsmith.data.shards.manifest import Manifest
from draftsmith.data.shards.shard_checks import check_text

NAN = float("nan")
STATES = f"hidden.{LAYER}"


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_small_cache(tmp_path_factory.mktemp("good"))


@pytest.fixture
def folder(good: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(good, tmp_path / "cache"))


@pytest.fixture
def upload() -> Iterator[Callable[[Path], str]]:
    """upload(folder) -> its URL in memory."""
    file_system, root = fsspec.core.url_to_fs("memory://checks/cache")

    def copy(folder: Path) -> str:
        for file in folder.iterdir():
            file_system.pipe_file(f"{root}/{file.name}", file.read_bytes())
        return "memory://checks/cache"

    yield copy
    file_system.rm("/checks", recursive=True)


def set_to(name: str, place: Any, value: Any) -> Callable[[Tensors], None]:
    return lambda tensors: tensors[name].__setitem__(place, value)


def replaced(name: str, change: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[Tensors], None]:
    return lambda tensors: tensors.update({name: change(tensors[name])})


# Of shard 1: samples of 4 and 6 tokens.
FAULTS: dict[str, tuple[Callable[[Tensors], object], str]] = {
    "fewer states than tokens": (replaced(STATES, lambda t: t[:-1]), rf"{STATES} is BF16 \[9, 4\], .* BF16 \[10, 4\]"),
    "narrower states": (replaced(STATES, lambda t: t[:, 1:]), rf"{STATES} is BF16 \[10, 3\]"),
    "states of another dtype": (replaced(STATES, torch.Tensor.float), rf"{STATES} is F32"),
    "fewer ids": (replaced("input_ids", lambda t: t[:-1]), r"input_ids is I32 \[9\]"),
    "ids of another dtype": (replaced("input_ids", torch.Tensor.long), r"input_ids is I64"),
    "a negative id": (set_to("input_ids", 3, -1), r"input_ids holds the token id -1"),
    "an id beyond the vocabulary": (
        set_to("input_ids", 3, VOCAB),
        r"input_ids holds the token id 100; .* of 100 tokens",
    ),
    "a negative greedy token": (set_to("greedy_ids", (0, 1), -3), r"greedy_ids holds the token id -3"),
    "a greedy token beyond": (set_to("greedy_ids", (0, 1), VOCAB), r"greedy_ids holds the token id 100"),
    "fewer greedy tokens": (replaced("greedy_ids", lambda t: t[:, :1]), r"greedy_ids is I32 \[10, 1\]"),
    "no greedy tokens": (lambda tensors: tensors.pop("greedy_ids"), r"lacks the tensors \['greedy_ids'\]"),
    "a shorter mask": (replaced("loss_mask", lambda t: t[:-1]), r"loss_mask is BOOL \[9\]"),
    "a mask of numbers": (replaced("loss_mask", torch.Tensor.float), r"loss_mask is F32"),
    "a mask of bytes": (replaced("loss_mask", lambda t: t.to(torch.uint8)), r"loss_mask is U8"),
    "another mask": (
        replaced("loss_mask", torch.ones_like),
        r"loss_mask has 10 tokens .* num_labelled of its record is 5",
    ),
    "offsets that step back": (set_to("offsets", 1, 12), r"offsets run from 0 to 10, -2 tokens for sample 1"),
    "an empty sample": (set_to("offsets", 1, 10), r"offsets run from 0 to 10, 0 tokens for sample 1"),
    "offsets from elsewhere": (set_to("offsets", 0, 1), r"offsets run from 1 to 10"),
    "offsets that end early": (set_to("offsets", 2, 9), r"offsets run from 0 to 9"),
    "offsets beyond": (set_to("offsets", 2, 2**40), r"offsets run from 0 to 1099511627776"),
    "one offset more": (replaced("offsets", lambda t: torch.tensor([0, 4, 8, 10])), r"offsets is I64 \[4\]"),
    "offsets of another dtype": (replaced("offsets", torch.Tensor.int), r"offsets is I32"),
    "no layer": (lambda tensors: tensors.pop(STATES), rf"lacks the tensors \['{STATES}'\]"),
    "a stray tensor": (lambda tensors: tensors.update(stray=torch.zeros(2)), r"has the tensors \['stray'\]"),
    "another layer": (
        lambda tensors: tensors.update({"hidden.x": tensors[STATES] + 0}),
        r"has the tensors \['hidden.x'\]",
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_shard_at_odds_with_itself_is_refused_when_it_is_opened(
    folder: Path, tmp_path: Path, upload: Callable[[Path], str], fault: str
) -> None:
    change, message = FAULTS[fault]
    spoil_shard(folder, change)
    with pytest.raises(ValueError, match=rf"shard-00001.safetensors:? .*{message}"):
        HiddenStateCache(folder)
    for check in ("lazy", "off"):
        cache = HiddenStateCache(folder, check=check)  # type: ignore[arg-type]
        assert cache[0].id == "s0-0"
        for read in (lambda cache=cache: cache[3], lambda cache=cache: list(cache.texts([3]))):
            with pytest.raises(ValueError, match=message):
                read()
    far = HiddenStateCache(upload(folder), shard_cache=tmp_path / "node", retry=Retry(1))
    with pytest.raises(ValueError, match=message):
        far[3]
    if fault not in ("a negative greedy token", "a greedy token beyond"):  # which texts do not read
        with pytest.raises(ValueError, match=message):
            list(far.texts([3]))


@pytest.mark.parametrize("ids", [["a"], ["a", 7], {"a": 1}, "[", "[" * 100_000, [["a"], "b"]])
def test_samples_without_a_name_each_are_refused(folder: Path, ids: Any) -> None:
    spoil_shard(folder, lambda tensors: None, ids=ids)
    with pytest.raises(ValueError, match=r"shard-00001.safetensors: ids in its metadata is"):
        HiddenStateCache(folder)


@pytest.mark.parametrize("bad", [NAN, float("inf"), -float("inf")])
def test_states_that_are_not_finite_are_refused_when_they_are_read_and_not_before(folder: Path, bad: float) -> None:
    spoil_shard(folder, set_to(STATES, (5, 2), bad))
    cache = HiddenStateCache(folder)
    assert cache[3].hidden[LAYER].shape == (4, WIDTH)
    sample = cache[4]
    assert list(sample.hidden) == [LAYER]
    message = rf"shard-00001.safetensors: sample s1-1: {STATES} holds NaN or infinity \(first at token 1\)"
    with pytest.raises(ValueError, match=message):
        sample.hidden[LAYER]
    with pytest.raises(ValueError, match=message):
        cache.verify_states()


@pytest.mark.parametrize(
    ("name", "bad", "message"),
    [
        (STATES, NAN, "holds NaN"),
        (f"scale.{LAYER}", NAN, "scale that is not above 0"),
        (f"scale.{LAYER}", 0.0, "scale that is not above 0"),
        (f"scale.{LAYER}", -1.0, "scale that is not above 0"),
        (f"scale.{LAYER}", float("inf"), "holds NaN or infinity"),
    ],
)
def test_codes_and_scales_of_eight_bits_are_numbers(tmp_path: Path, name: str, bad: float, message: str) -> None:
    folder = write_small_cache(tmp_path / "cache", "float8_e4m3")
    place = (5, 2) if name == STATES else 5
    value = torch.tensor(bad).to(torch.float8_e4m3fn) if name == STATES else bad
    spoil_shard(folder, set_to(name, place, value))
    cache = HiddenStateCache(folder)
    assert bool(cache[3].hidden[LAYER].isfinite().all())
    with pytest.raises(ValueError, match=rf"shard-00001.safetensors: sample s1-1: {STATES} .*{message}"):
        cache[4].hidden[LAYER]


def test_offsets_that_rise_only_because_steps_overflow_are_refused(folder: Path) -> None:
    record = replace(Manifest.load(folder).shards[0], num_samples=4, num_labelled=10)
    offsets = torch.tensor([0, 2**63 - 1, -(2**63), -1, 10])
    assert bool((offsets.diff() > 0).all())
    with pytest.raises(ValueError, match=r"here: offsets run from 0 to 10, between -9223372036854775808 and"):
        check_text(offsets, torch.arange(10), torch.ones(10, dtype=torch.bool), record, VOCAB, "here")


def test_lengths_that_are_not_those_of_the_shards_are_refused(folder: Path) -> None:
    spoil_lengths(folder, [3, 5, 2, 5, 5, 1, 7, 2])  # the sums are right
    with pytest.raises(
        ValueError, match=r"shard-00001.safetensors: offsets give sample 0 4 tokens, lengths.* gives it 5"
    ):
        HiddenStateCache(folder)
    lazy = HiddenStateCache(folder, check="lazy")
    assert lazy.sample_lengths[3] == 5
    with pytest.raises(ValueError, match=r"offsets give sample 0 4 tokens"):
        lazy[3]
    spoil_lengths(folder, [3, 5, 2, 10, 0, 1, 7, 2])
    with pytest.raises(ValueError, match=r"lengths.safetensors tells of 8 samples"):
        HiddenStateCache(folder)


def test_a_vocabulary_that_is_known_later_holds_for_what_is_open_and_what_is_not(folder: Path) -> None:
    """Caches of earlier versions do not say how many tokens there are; training and the doctor know."""
    change_manifest(folder, lambda manifest: manifest["identity"].pop("vocab_size"))
    cache = HiddenStateCache(folder, check="lazy")
    assert cache[0].input_ids.tolist() == [0, 1, 2]
    cache.check_target("f", vocab_size=VOCAB)
    with pytest.raises(
        ValueError, match=r"shard-00000.safetensors: input_ids holds the token id 9; .* vocabulary of 9"
    ):
        cache.check_target("f", vocab_size=9)
    with pytest.raises(ValueError, match=r"shard-00001.safetensors: input_ids holds the token id 40"):
        cache[3]


def test_behind_a_url_a_header_that_lies_is_refused(
    folder: Path, tmp_path: Path, upload: Callable[[Path], str]
) -> None:
    path = folder / "shard-00001.safetensors"
    content = path.read_bytes()
    size = int.from_bytes(content[:8], "little")
    for old, new in (
        (b'"I32"', b'"I99"'),
        (b"[0,24]", b"[4,24]"),
        (b"[0,24]", b"[0,99]"),
        (b'"shape"', b'"shapf"'),
        (b"{", b"["),
    ):
        header = content[8 : 8 + size].replace(old, new, 1)
        assert header != content[8 : 8 + size]
        path.write_bytes(content[:8] + header + content[8 + size :])
        far = HiddenStateCache(upload(folder), shard_cache=tmp_path / "node", retry=Retry(1))
        with pytest.raises(ValueError, match=r"memory://checks/cache/shard-00001.safetensors"):
            list(far.texts([3]))
    path.write_bytes((2**63).to_bytes(8, "little") + content[8:])
    far = HiddenStateCache(upload(folder), shard_cache=tmp_path / "node", retry=Retry(1))
    with pytest.raises(ValueError, match=r"its header has 9223372036854775816 bytes"):
        list(far.texts([3]))
