"""A cache that is read: what is hashed when, and which manifests are an error."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors
import torch

from draftsmith.data.cache import local_shards as shards_module
from draftsmith.data.cache.extract import HiddenStateCache, extract
from draftsmith.data.cache.extraction import StorageOptions
from draftsmith.data.shards.manifest import Manifest


@pytest.fixture
def folder(tmp_path: Path, target: Path, reply_file: Path) -> Path:
    out = tmp_path / "cache"
    extract(str(target), reply_file, out, storage=StorageOptions(shard_mib=0.003))
    return out


@pytest.fixture
def hashed(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of all shards whose sha256 is computed."""
    names: list[str] = []
    real = shards_module.check_digest

    def noted(path: Path, record: Any) -> None:
        names.append(path.name)
        real(path, record)

    monkeypatch.setattr(shards_module, "check_digest", noted)
    return names


def test_texts_of_a_lazily_checked_cache_are_read_without_hashing_states(folder: Path, hashed: list[str]) -> None:
    lazy = HiddenStateCache(folder, check="lazy")
    texts = list(lazy.texts(range(len(lazy))))
    assert hashed == []
    for (ids, mask), sample in zip(texts, lazy, strict=True):
        assert torch.equal(ids, sample.input_ids)
        assert torch.equal(mask, sample.loss_mask)
    # What is served for training is checked all the same, though its file was open already.
    assert hashed == [shard.name for shard in lazy.manifest.shards]


def test_an_altered_shard_is_refused_after_its_texts_were_read(folder: Path) -> None:
    path = folder / "shard-00001.safetensors"
    with safetensors.safe_open(path, framework="pt") as file:
        num_tokens = len(file.get_tensor("loss_mask"))  # which lies last, behind the states
    content = bytearray(path.read_bytes())
    content[-num_tokens - 1] ^= 1
    path.write_bytes(content)
    lazy = HiddenStateCache(folder, check="lazy")
    assert len(list(lazy.texts(range(len(lazy))))) == len(lazy)
    with pytest.raises(ValueError, match=r"shard-00001.safetensors was altered"):
        list(lazy)


def test_texts_outside_of_the_cache_are_refused(folder: Path) -> None:
    for index in (-1, 12):
        with pytest.raises(IndexError, match=f"sample {index} of a cache with 12"):
            list(HiddenStateCache(folder, check="lazy").texts([index]))


def change(folder: Path, how: Callable[[dict[str, Any]], object]) -> None:
    path = folder / "manifest.json"
    content = json.loads(path.read_text())
    how(content)
    path.write_text(json.dumps(content))


@pytest.mark.parametrize(
    ("how", "complaint"),
    [
        (lambda manifest: manifest.update(shards=None), r"shards is None, it must be a list of objects"),
        (lambda manifest: manifest.update(shards={}), r"shards is \{\}, it must be a list of objects"),
        (lambda manifest: manifest.update(shards=["a"]), r"ShardRecord lacks \['name'"),
        (lambda manifest: manifest.update(identity=None), r"identity is None, it must be an object"),
        (
            lambda manifest: manifest.update(num_samples="3"),
            r"num_samples is '3', it must be a whole number, 0 or more",
        ),
        (lambda manifest: manifest.update(num_tokens=-1), r"num_tokens is -1, it must be a whole number, 0 or more"),
        (lambda manifest: manifest.update(num_cut=True), r"num_cut is True, it must be a whole number"),
        (lambda manifest: manifest.update(num_dropped=1.5), r"num_dropped is 1.5, it must be a whole number"),
        (lambda manifest: manifest.update(complete="yes"), r"complete is 'yes', it must be true or false"),
        (lambda manifest: manifest.update(lengths_sha256=7), r"lengths_sha256 is 7, it must be text or null"),
        (
            lambda manifest: manifest["identity"].update(layers=None),
            r"identity.layers is None, it must be a list of texts",
        ),
        (lambda manifest: manifest["identity"].update(layers="last"), r"identity.layers is 'last', it must be a list"),
        (lambda manifest: manifest["identity"].update(layers=[1]), r"identity.layers is \[1\], it must be a list"),
        (lambda manifest: manifest["identity"].update(dtype=None), r"identity.dtype is None, it must be text"),
        (
            lambda manifest: manifest["identity"].update(shard_mib="1"),
            r"identity.shard_mib is '1', it must be a number",
        ),
        (
            lambda manifest: manifest["shards"][1].update(num_bytes="9"),
            r"shards\[1\].num_bytes is '9', it must be a whole",
        ),
        (lambda manifest: manifest["shards"][2].update(name=None), r"shards\[2\].name is None, it must be text"),
    ],
)
def test_a_manifest_with_a_field_of_another_type_is_refused(
    folder: Path, how: Callable[[dict[str, Any]], object], complaint: str
) -> None:
    change(folder, how)
    with pytest.raises(ValueError, match=rf"manifest.json: {complaint}.*; copy the cache again, or extract it again"):
        HiddenStateCache(folder)


def test_a_complete_cache_whose_shards_do_not_hold_its_samples_is_refused(folder: Path) -> None:
    change(folder, lambda manifest: manifest.update(shards=[]))
    with pytest.raises(ValueError, match=r"complete is true, but its 0 shards hold 0 of 12 samples; copy the cache"):
        HiddenStateCache(folder)
    change(folder, lambda manifest: manifest.update(complete=False))
    assert Manifest.load(folder).shards == ()
