"""A GGUF file is a target like the model's own folder: the same logits, tokens, template and ends; or one error in words."""

from __future__ import annotations

import importlib.util
import shutil
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny import EOS, TEMPLATE, save_target
from tokenizers import pre_tokenizers
from transformers import PreTrainedTokenizerFast

from draftsmith.cli import main
from draftsmith.models import Target, TargetEnds, load_tokenizer
from draftsmith.models.drafters.drafter_folder import load_drafter
from draftsmith.models.files import gguf_folder
from draftsmith.models.files.end_tokens import read_end_tokens
from draftsmith.models.files.model_folder import openable_name, resolve

if importlib.util.find_spec("gguf") is None:
    pytest.skip("needs the gguf package: pip install 'draftsmith[gguf]'", allow_module_level=True)
import gguf
from gguf_files import FIRST, write_gguf


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    place = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(place))
        yield place / "draftsmith" / "gguf"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_target(tmp_path_factory.mktemp("folder"))


@pytest.fixture(scope="module")
def file(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_gguf(tmp_path_factory.mktemp("file") / "tiny.gguf", folder)


def logits(path: Path) -> torch.Tensor:
    return Target.load(str(path)).model(torch.arange(5, 25)[None]).logits


def test_its_logits_are_those_of_the_same_weights_in_a_folder(file: Path, folder: Path) -> None:
    assert torch.equal(logits(file), logits(folder))


@pytest.mark.parametrize(("kind", "bound"), [("F16", 0.01), ("Q8_0", 0.2)])
def test_narrow_weights_are_dequantised(folder: Path, tmp_path: Path, kind: str, bound: float) -> None:
    narrow = write_gguf(tmp_path / "tiny.gguf", folder, kind)
    target = Target.load(str(narrow))
    assert {parameter.dtype for parameter in target.model.parameters()} == {torch.float32}
    difference = (logits(narrow) - logits(folder)).abs().max()
    assert 0 < difference < bound * logits(folder).abs().max()


def test_the_ends_are_loaded_without_the_trunk(file: Path) -> None:
    ends, target = TargetEnds.load(str(file)), Target.load(str(file))
    assert torch.equal(ends.head_weight, target.ends.head_weight)
    assert ends.fingerprint == target.fingerprint
    assert ends.config.num_hidden_layers == 2


def test_tokens_template_and_end_tokens_are_those_of_the_folder(file: Path, folder: Path) -> None:
    ours, theirs = load_tokenizer(str(file)), load_tokenizer(str(folder))
    text = "Tom has 3 apples,\n\nand  buys four."
    assert isinstance(ours, PreTrainedTokenizerFast)
    assert ours.encode(text) == theirs.encode(text)
    assert ours.decode(ours.encode(text)) == text
    chat = [{"role": "user", "content": "How many?"}]
    assert ours.apply_chat_template(chat, tokenize=False) == theirs.apply_chat_template(chat, tokenize=False)
    assert read_end_tokens(str(file)) == Target.load(str(file)).eos_token_ids == (EOS,)


def test_special_tokens_are_those_that_the_file_states(file: Path) -> None:
    tokenizer = load_tokenizer(str(file))
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (FIRST, EOS, 0)
    assert tokenizer.unk_token is None


def test_a_file_without_a_first_token_has_none(folder: Path, tmp_path: Path) -> None:
    tokenizer = load_tokenizer(str(write_gguf(tmp_path / "tiny.gguf", folder, first=None)))
    assert (tokenizer.bos_token, tokenizer.eos_token_id) == (None, EOS)
    assert len(tokenizer) == Target.load(str(tmp_path / "tiny.gguf")).config.vocab_size


def test_a_file_that_puts_a_first_token_and_names_none_is_an_error(folder: Path, tmp_path: Path) -> None:
    nameless = write_gguf(tmp_path / "tiny.gguf", folder, first=None, begins=True)
    with pytest.raises(ValueError, match=r"tiny\.gguf puts a token before each text .* does not say which"):
        load_tokenizer(str(nameless))


def test_text_is_split_by_the_rule_that_the_file_names(folder: Path, tmp_path: Path) -> None:
    words = {}
    for name in ("gpt-2", "llama-bpe", "smollm"):
        tokenizer = load_tokenizer(str(write_gguf(tmp_path / f"{name}.gguf", folder, pre=name)))
        words[name] = [word for word, _ in tokenizer.backend_tokenizer.pre_tokenizer.pre_tokenize_str("now 12345")]
    assert words == {
        "gpt-2": ["now", "Ġ12345"],
        "llama-bpe": ["now", "Ġ", "123", "45"],
        "smollm": ["now", "Ġ", "1", "2", "3", "4", "5"],
    }


def test_a_tokenizer_that_transformers_reads_back_as_another_is_an_error(
    folder: Path, tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def splits_nothing(place: Path) -> Any:
        tokenizer = read(place)
        tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
        return tokenizer

    read = gguf_folder.read_tokenizer
    monkeypatch.setattr(gguf_folder, "read_tokenizer", splits_nothing)
    changed = write_gguf(tmp_path / "changed.gguf", folder, change=lambda writer: writer.add_name("changed"))
    before = set(cache.iterdir()) if cache.exists() else set()
    with pytest.raises(ValueError, match=r"changed\.gguf has a tokenizer that Transformers does not keep"):
        load_tokenizer(str(changed))
    assert set(cache.iterdir()) - before <= {cache / ".lock"}


def test_ends_of_turns_and_messages_end_a_reply_too(folder: Path, tmp_path: Path) -> None:
    several = write_gguf(tmp_path / "tiny.gguf", folder, change=lambda writer: writer.add_eot_token_id(7))
    assert read_end_tokens(str(several)) == (EOS, 7)


def test_the_same_weights_have_the_same_fingerprint_wherever_they_lie(file: Path, folder: Path, tmp_path: Path) -> None:
    named = write_gguf(tmp_path / "other.gguf", folder, change=lambda writer: writer.add_name("other"))
    assert named.read_bytes() != file.read_bytes()
    assert TargetEnds.load(str(named)).fingerprint == TargetEnds.load(str(file)).fingerprint
    save_target(tmp_path / "another", seed=1)
    another = write_gguf(tmp_path / "another.gguf", tmp_path / "another")
    assert TargetEnds.load(str(another)).fingerprint != TargetEnds.load(str(file)).fingerprint


def test_a_file_is_converted_once_and_found_by_its_content(
    file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = resolve(str(file))
    monkeypatch.setattr(gguf_folder, "_convert", None)
    shutil.copy(file, tmp_path / "copy.gguf")
    assert resolve(str(tmp_path / "copy.gguf")) == place
    assert openable_name(str(file)) == str(place)


def test_a_folder_with_one_gguf_file_and_no_other_weights_is_that_file(file: Path, tmp_path: Path) -> None:
    shutil.copy(file, tmp_path / "a.gguf")
    (tmp_path / "config.json").write_text("{}")
    assert resolve(str(tmp_path)) == resolve(str(file))
    shutil.copy(file, tmp_path / "b.gguf")
    with pytest.raises(ValueError, match=r"several GGUF files \(here: a\.gguf, b\.gguf\); give the path of one"):
        resolve(str(tmp_path))


def test_what_lies_beside_the_file_is_not_read(file: Path, tmp_path: Path) -> None:
    own = write_beside(file, tmp_path)
    assert load_tokenizer(str(own)).chat_template == TEMPLATE
    assert Target.load(str(own)).config.num_hidden_layers == 2


def write_beside(file: Path, folder: Path) -> Path:
    """A copy with another hash, so that it is converted anew among files of other models."""
    own = folder / "own.gguf"
    own.write_bytes(file.read_bytes() + b"\0")
    (folder / "chat_template.jinja").write_text("other")
    (folder / "tokenizer_config.json").write_text('{"chat_template": "other"}')
    (folder / "adapter_config.json").write_text("{}")
    (folder / "config.json").write_text('{"model_type": "llama", "num_hidden_layers": 9}')
    return own


def test_it_decodes_by_the_command_and_drafts_as_a_draft_lm(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["decode", "--target", str(file), "--drafter", str(file), "--prompt", "Tom has", "--max_new_tokens", "8"]
    assert main(command) == 0
    assert "tokens per step" in "".join(capsys.readouterr())
    assert load_drafter(file).lm.fingerprint == TargetEnds.load(str(file)).fingerprint


FAULTS: dict[str, tuple[dict[str, Any], str]] = {
    "a missing tensor": ({"without": "model.layers.1.mlp.up_proj.weight"}, r"missing keys: model\.layers\.1\.mlp\.up_proj"),
    "an unknown tensor": (
        {"change": lambda writer: writer.add_tensor("rope_freqs.weight", np.ones(4, np.float32))},
        r"unexpected keys: rope_freqs\.weight",
    ),
    "a short tensor": ({"short": "model.layers.1.mlp.up_proj.weight"}, r"mismatched shapes: model\.layers\.1\.mlp\.up_proj"),
    "an unknown split": ({"pre": "youtu"}, r"splits text by the rule 'youtu', which is not known here"),
    "another size": ({"change": lambda writer: writer.add_vocab_size(200)}, "mismatched shapes"),
    "an unknown architecture": ({"architecture": "plamo"}, r"the architecture 'plamo', which Transformers does not read"),
    "a scaled rope": (
        {"change": lambda writer: writer.add_rope_scaling_type(gguf.RopeScalingType.YARN)},
        r"scales its rope \('yarn'\)",
    ),
    "an adapter": ({"change": lambda writer: writer.add_type("adapter")}, "holds no model but 'adapter'"),
    "one of several parts": (
        {"change": lambda writer: writer.add_uint16("split.count", 3)},
        r"is one of 3 parts; join them with `llama-gguf-split --merge`",
    ),
}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
def test_what_transformers_would_leave_out_is_an_error(folder: Path, tmp_path: Path, cache: Path, fault: str) -> None:
    settings, message = FAULTS[fault]
    broken = write_gguf(tmp_path / "broken.gguf", folder, **settings)
    before = set(cache.iterdir()) if cache.exists() else set()
    with pytest.raises(ValueError, match=message) as error:
        Target.load(str(broken))
    assert str(broken) in str(error.value)
    assert (set(cache.iterdir()) if cache.exists() else set()) - before <= {cache / ".lock"}


def text(content: str) -> bytes:
    return struct.pack("<Q", len(content)) + content.encode()


def head(num_tensors: int, num_fields: int) -> bytes:
    return b"GGUF" + struct.pack("<IQQ", 3, num_tensors, num_fields)


def tensor(dimensions: list[int], kind: int, offset: int = 0) -> bytes:
    sizes = struct.pack(f"<I{len(dimensions)}Q", len(dimensions), *dimensions)
    return text("a") + sizes + struct.pack("<IQ", kind, offset)


HOSTILE: dict[str, tuple[bytes, str]] = {
    "an empty file": (b"", "is empty"),
    "another file": (b"PK\3\4" + bytes(64), "does not begin with GGUF"),
    "the first bytes alone": (b"GGUF\3", "is cut off or damaged"),
    "big-endian": (b"GGUF" + struct.pack(">IQQ", 3, 0, 0), "big-endian"),
    "endless fields": (head(0, 2**63), "is cut off or damaged"),
    "endless tensors": (head(2**63, 0), "is cut off or damaged"),
    "an endless string": (head(0, 1) + struct.pack("<Q", 2**63), "is cut off or damaged"),
    "an endless array": (head(0, 1) + text("a") + struct.pack("<IIQ", 9, 4, 2**62), "is cut off or damaged"),
    "arrays of arrays": (head(0, 1) + text("a") + struct.pack("<IIQ", 9, 9, 1) + bytes(64), "array of the type 9"),
    "an unknown type of value": (head(0, 1) + text("a") + struct.pack("<I", 99) + bytes(64), "unknown type 99"),
    "a key that is no text": (head(0, 1) + struct.pack("<Q", 2) + b"\xff\xff" + bytes(64), "is cut off or damaged"),
    "a thousand dimensions": (head(1, 0) + text("a") + struct.pack("<I", 1000) + bytes(9000), "1000 dimensions"),
    "an unknown type of tensor": (head(1, 0) + tensor([4], 999) + bytes(64), "unknown type 999"),
    "a tensor past the end": (head(1, 0) + tensor([2**40, 2**40], 0) + bytes(64), "missing: a"),
    "an offset past the end": (head(1, 0) + tensor([4], 0, 2**60) + bytes(64), "missing: a"),
    "one tensor twice": (head(2, 0) + tensor([4], 0) * 2 + bytes(96), "two tensors of one name"),
    "no architecture": (head(1, 0) + tensor([4], 0) + bytes(96), "the architecture '', which"),
}


@pytest.mark.parametrize("kind", HOSTILE)
def test_a_hostile_file_is_one_error_that_names_it(tmp_path: Path, kind: str) -> None:
    content, message = HOSTILE[kind]
    bad = tmp_path / "bad.gguf"
    bad.write_bytes(content)
    with pytest.raises(ValueError, match=message) as error:
        Target.load(str(bad))
    assert str(bad) in str(error.value)


@pytest.mark.parametrize("share", [0.1, 0.5, 0.99])
def test_a_file_cut_off_anywhere_is_one_error_that_names_it(file: Path, tmp_path: Path, share: float) -> None:
    bad, content = tmp_path / "bad.gguf", file.read_bytes()
    bad.write_bytes(content[: int(len(content) * share)])
    with pytest.raises(ValueError, match=r"bad\.gguf is cut off"):
        Target.load(str(bad))


def test_without_the_package_the_error_has_the_command_that_installs_it(
    file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    new = tmp_path / "new.gguf"
    new.write_bytes(file.read_bytes() + b"\0\0")
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *more: None if name == "gguf" else find(name, *more))
    with pytest.raises(ValueError, match=r"needs the gguf package; run: .* -m pip install '?gguf"):
        Target.load(str(new))


def test_a_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"none\.gguf' does not exist"):
        Target.load(str(tmp_path / "none.gguf"))
