"""What a file from elsewhere may say: which of its fields become file names, and JSON that is none."""

import hashlib

import pytest

from draftsmith.outside import (
    is_sha256,
    is_shard_name,
    parse_json,
    parse_json_object,
    safe_file_name,
    safe_sha256,
    safe_shard_name,
)

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


@pytest.mark.parametrize("value", ["", ".", "..", ".hidden", "a/b", "/a", "a\\b", "a b", "a\0", "x" * 300, 7, None])
def test_a_plain_file_name_stays_in_its_folder(value: object) -> None:
    assert safe_file_name("model-00001-of-00002.safetensors", "here") == "model-00001-of-00002.safetensors"
    with pytest.raises(ValueError, match=r"index.json: the file of x is .*, which is no plain file name"):
        safe_file_name(value, "index.json: the file of x")


@pytest.mark.parametrize("text", [b"{", b"", b"\xff", b"[" * 100_000, b'{"a":' * 100_000, b"1" * 5000])
def test_what_is_no_json_is_told_with_its_file(text: bytes) -> None:
    with pytest.raises(ValueError, match=r"a.json is not valid JSON \(.*\); copy it again"):
        parse_json(text, "a.json", "copy it again")


def test_an_object_is_an_object() -> None:
    assert parse_json_object(b'{"a": [1]}', "a.json", "") == {"a": [1]}
    with pytest.raises(ValueError, match=r"a.json is not a JSON object but list; copy it again"):
        parse_json_object("[]", "a.json", "copy it again")
