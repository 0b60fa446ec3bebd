"""States that a serving engine wrote: read from its folder or asked of a server, and equal to those of an extraction here."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from draftsmith.data.cache import extraction
from draftsmith.data.cache.engine_states import EngineOptions, ServerStates, StatesLayout, layer_names
from draftsmith.data.cache.extract import HiddenStateCache, extract
from draftsmith.data.cache.extraction import StorageOptions
from draftsmith.data.chats.tokenized_samples import TokenizedSample
from draftsmith.models.target.target import PRE_NORM, Target

LAYERS = ("layer.0.output", PRE_NORM)
COUNTED = (1, 2)
WHOLE = StorageOptions(layers=LAYERS, dtype="float32")
LAYOUT = StatesLayout(LAYERS, 32)


def texts(reply_file: Path) -> list[list[int]]:
    rows = [json.loads(line) for line in reply_file.read_text().splitlines()]
    return [row["prompt_ids"] + row["reply_ids"] for row in rows]


def as_engine(target: Target, ids: list[int]) -> dict[str, torch.Tensor]:
    """What vLLM writes for a request: the states behind each block that was asked for, in one tensor."""
    states = target.prefix(torch.tensor([ids]), ("layer.0.output",))
    by_layer = [states.feature(name)[0].clone() for name in LAYERS]
    return {"token_ids": torch.tensor(ids), "hidden_states": torch.stack(by_layer, dim=1)}


@pytest.fixture
def written(tmp_path: Path, target: Path, reply_file: Path) -> Path:
    folder, loaded = tmp_path / "states", Target.load(str(target))
    folder.mkdir()
    for number, ids in enumerate(texts(reply_file)):
        save_file(as_engine(loaded, ids), folder / f"hs_{number}.safetensors")
    return folder


def same(first: Path, second: Path) -> None:
    for own, other in zip(HiddenStateCache(first), HiddenStateCache(second), strict=True):
        assert own.id == other.id
        assert torch.equal(own.input_ids, other.input_ids)
        assert torch.equal(own.loss_mask, other.loss_mask)
        for layer in LAYERS:
            torch.testing.assert_close(own.hidden[layer], other.hidden[layer], atol=1e-5, rtol=1e-4)


def test_a_folder_of_states_makes_the_cache_of_an_extraction(
    tmp_path: Path, target: Path, reply_file: Path, written: Path
) -> None:
    extract(str(target), reply_file, tmp_path / "own", storage=WHOLE)
    extract(str(target), reply_file, tmp_path / "read", storage=WHOLE, engine=EngineOptions(written, COUNTED))
    same(tmp_path / "own", tmp_path / "read")
    identity = HiddenStateCache(tmp_path / "read").manifest.identity
    assert identity.states_from == "engine"
    assert HiddenStateCache(tmp_path / "own").manifest.identity.states_from is None


def test_rows_of_ids_and_masks_are_samples_as_speculators_keeps_them(
    tmp_path: Path, target: Path, reply_file: Path, written: Path
) -> None:
    rows = [json.loads(line) for line in reply_file.read_text().splitlines()]
    own = [
        {
            "id": row["id"],
            "input_ids": row["prompt_ids"] + row["reply_ids"],
            "loss_mask": [0] * len(row["prompt_ids"]) + [1] * len(row["reply_ids"]),
        }
        for row in rows
    ]
    source = tmp_path / "speculators.jsonl"
    source.write_text("".join(json.dumps(row) + "\n" for row in own))
    extract(str(target), reply_file, tmp_path / "own", storage=WHOLE)
    extract(str(target), source, tmp_path / "read", storage=WHOLE, engine=EngineOptions(written, COUNTED))
    same(tmp_path / "own", tmp_path / "read")


def test_samples_that_are_cut_take_the_beginning_of_their_states(
    tmp_path: Path, target: Path, reply_file: Path, written: Path
) -> None:
    length = max(map(len, texts(reply_file))) - 2
    short = StorageOptions(layers=LAYERS, dtype="float32", max_length=length)
    extract(str(target), reply_file, tmp_path / "own", storage=short)
    extract(str(target), reply_file, tmp_path / "read", storage=short, engine=EngineOptions(written, COUNTED))
    same(tmp_path / "own", tmp_path / "read")


@pytest.mark.parametrize("shape", [(5, 1, 1), (5, 1), (5,)])
def test_states_of_eight_bits_are_read_with_their_scales(shape: tuple[int, ...], tmp_path: Path) -> None:
    states = torch.randn(5, 2, 32)
    scales = states.abs().amax((1, 2), keepdim=True) / 448
    packed = {"hidden_states": (states / scales).to(torch.float8_e4m3fn), "hidden_states_scales": scales.reshape(shape)}
    save_file(packed | {"token_ids": torch.arange(5)}, tmp_path / "hs_0.safetensors")
    got = LAYOUT.read(tmp_path / "hs_0.safetensors", range(5))
    torch.testing.assert_close(got[PRE_NORM], states[:, 1], atol=0.1, rtol=0.07)


def test_scales_that_are_not_one_for_each_token_are_an_error(tmp_path: Path) -> None:
    packed = {"hidden_states": torch.zeros(5, 2, 32), "hidden_states_scales": torch.ones(5, 2)}
    save_file(packed | {"token_ids": torch.arange(5)}, tmp_path / "hs_0.safetensors")
    with pytest.raises(ValueError, match=r"hidden_states_scales has the shape \[5, 2\]; it is one number for each"):
        LAYOUT.read(tmp_path / "hs_0.safetensors", range(5))


def test_layers_are_counted_as_the_engine_counts_them() -> None:
    assert layer_names((3, 32), 32, "T") == ("layer.2.output", PRE_NORM)
    for wrong in ((0, 32), (33,), (2, 2)):
        with pytest.raises(ValueError, match=r"states_layers are .* from 1 to 32 \(the last block of T\)"):
            layer_names(wrong, 32, "T")


def spoiled(change: Callable[[dict[str, Any]], object]) -> Callable[[Path], None]:
    def spoil(path: Path) -> None:
        tensors = load_file(path)
        change(tensors)
        save_file(tensors, path)

    return spoil


SPOILED = {
    "another text": (spoiled(lambda tensors: tensors["token_ids"].add_(1)), r"none of the \d+ files .* holds its \d+ tokens"),
    "no states": (spoiled(lambda tensors: tensors.pop("hidden_states")), r"hs_1.safetensors has no hidden_states"),
    "a layer too few": (
        spoiled(lambda tensors: tensors.update(hidden_states=tensors["hidden_states"][:, :1].contiguous())),
        r"hs_1.safetensors: hidden_states has the shape .*make \[tokens, 2, 32\].*--states-layers",
    ),
    "not finite": (spoiled(lambda tensors: tensors["hidden_states"].fill_(float("nan"))), "is NaN or infinite"),
    "whole numbers": (
        spoiled(lambda tensors: tensors.update(hidden_states=tensors["hidden_states"].long())), "hidden_states is torch.int64"
    ),
    "cut off": (lambda path: path.write_bytes(path.read_bytes()[:-9]), r"hs_1.safetensors cannot be read"),
    "deleted": (Path.unlink, r"none of the \d+ files"),
}  # fmt: skip


@pytest.mark.parametrize(("spoil", "message"), SPOILED.values(), ids=SPOILED)
def test_files_that_do_not_hold_the_samples_states_are_errors_that_name_them(
    tmp_path: Path, target: Path, reply_file: Path, written: Path, spoil: Callable[[Path], None], message: str
) -> None:
    spoil(written / "hs_1.safetensors")
    with pytest.raises(ValueError, match=message):
        extract(str(target), reply_file, tmp_path / "read", storage=WHOLE, engine=EngineOptions(written, COUNTED))


def test_options_that_do_not_go_together_are_errors(
    tmp_path: Path, target: Path, reply_file: Path, written: Path
) -> None:
    with pytest.raises(ValueError, match="--states needs --states-layers"):
        EngineOptions(written)
    with pytest.raises(ValueError, match="name their folder"):
        EngineOptions(states_url="http://host:8000")
    engine = EngineOptions(written, COUNTED)
    with pytest.raises(ValueError, match="no greedy continuations"):
        extract(str(target), reply_file, tmp_path / "c", storage=StorageOptions(local_horizon=2), engine=engine)
    with pytest.raises(ValueError, match=r"layer 'layer.1.output' is not among those of the engine's files"):
        extract(
            str(target), reply_file, tmp_path / "c", storage=StorageOptions(layers=("layer.1.output",)), engine=engine
        )
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"has no \*.safetensors"):
        extract(
            str(target), reply_file, tmp_path / "c", storage=WHOLE, engine=EngineOptions(tmp_path / "empty", COUNTED)
        )


class FakeEngine:
    """In place of a vLLM server: answers with the path of a file that it has just written."""

    url = "http://fake/v1"

    def __init__(self, target: Target, folder: Path) -> None:
        self.target, self.folder, self.asked = target, folder, 0
        self.alone = threading.Lock()  # a target here runs one forward at a time

    def get(self, path: str, read: Callable[[dict[str, Any]], str]) -> str:
        assert path == "/models"
        return read({"data": [{"id": "big"}]})

    def post(self, path: str, body: dict[str, Any], read: Callable[[dict[str, Any]], Path]) -> Path:
        assert (path, body["model"], body["max_tokens"]) == ("/completions", "big", 1)
        with self.alone:
            self.asked += 1
            file = self.folder / f"cmpl-{self.asked}.safetensors"
            save_file(as_engine(self.target, body["prompt"]), file)
        Path(f"{file}.lock").touch()
        return read({"kv_transfer_params": {"hidden_states_path": str(file)}})


def test_a_server_is_asked_for_each_sample_and_its_files_are_taken_away(
    tmp_path: Path, target: Path, reply_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (folder := tmp_path / "shared").mkdir()
    loaded = Target.load(str(target))
    fake = FakeEngine(loaded, folder)
    monkeypatch.setattr(
        extraction, "open_source", lambda options, ends, stored, length: ServerStates(options.states, LAYOUT, fake)
    )
    extract(str(target), reply_file, tmp_path / "own", storage=WHOLE)
    engine = EngineOptions(folder, COUNTED, "http://fake")
    extract(str(target), reply_file, tmp_path / "read", storage=WHOLE, engine=engine)
    same(tmp_path / "own", tmp_path / "read")
    assert fake.asked == len(texts(reply_file))
    assert not list(folder.iterdir())


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        ({}, "names no file of states.*extract_hidden_states"),
        ({"kv_transfer_params": {"hidden_states_path": "/etc/hostname"}}, "outside of .*shared_storage_path"),
    ],
)
def test_answers_without_a_file_in_the_folder_are_errors(
    tmp_path: Path, target: Path, answer: dict[str, Any], message: str
) -> None:
    class Other(FakeEngine):
        def post(self, path: str, body: dict[str, Any], read: Callable[[dict[str, Any]], Path]) -> Path:
            return read(answer)

    source = ServerStates(tmp_path, LAYOUT, Other(Target.load(str(target)), tmp_path))
    with pytest.raises(ValueError, match=message):
        list(source.read([TokenizedSample("a", [5, 6], [False, True])]))
