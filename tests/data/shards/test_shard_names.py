"""The names of a cache's files: no other text becomes part of a path."""

import hashlib

import pytest

from draftsmith.data.shards.shard_names import is_sha256, is_shard_name, safe_sha256, safe_shard_name

DIGEST = hashlib.sha256(b"x").hexdigest()


@pytest.mark.parametrize("value", [DIGEST, "0" * 64])
def test_a_sha256_is_64_hex_digits(value: str) -> None:
    assert is_sha256(value)
    assert safe_sha256(value) == value


@pytest.mark.parametrize(
    "value",
    [
        "",
        DIGEST[:-1],
        DIGEST + "0",
        DIGEST + "\n",
        DIGEST.upper(),
        "../" + DIGEST[3:],
        "\u0660" * 64,
        None,
        7,
        [DIGEST],
    ],
)
def test_nothing_else_is_one(value: object) -> None:
    assert not is_sha256(value)
    with pytest.raises(ValueError, match=r"is no sha256 and names no file; it must be 64 hex digits"):
        safe_sha256(value)  # type: ignore[arg-type]


@pytest.mark.parametrize("value", ["shard-00000.safetensors", "shard-123456.safetensors"])
def test_a_shard_is_named_by_its_number(value: str) -> None:
    assert is_shard_name(value)
    assert safe_shard_name(value) == value


@pytest.mark.parametrize(
    "value",
    [
        "shard-0000.safetensors",
        "shard-00000.safetensors\n",
        "shard-00000xsafetensors",
        "a/shard-00000.safetensors",
        "shard-00000.safetensors/..",
        "../shard-00000.safetensors",
        "shard-" + "0" * 300 + ".safetensors",
        "shard-\u0661\u0661\u0661\u0661\u0661.safetensors",
        "manifest.json",
        None,
    ],
)
def test_nothing_else_is_a_shards_name(value: object) -> None:
    assert not is_shard_name(value)
    with pytest.raises(ValueError, match=r"names no shard; it must be a name such as shard-00000.safetensors"):
        safe_shard_name(value)  # type: ignore[arg-type]
