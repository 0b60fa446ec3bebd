"""Faults planted in the states, labels and text of a cache: each is found, named and answered."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from doctor_runs import Found, Run, faults, skip_all_but
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny import EOS
from torch import Tensor

from draftsmith.data.cache.extract import extract
from draftsmith.data.cache.extraction import StorageOptions
from draftsmith.models import TargetEnds


@pytest.mark.parametrize("ends_only", [False, True])
def test_states_after_the_norm_under_the_name_before_it(
    run: Run, look: Callable[..., Found], plant: Callable[..., Path], ends_only: bool
) -> None:
    ends = TargetEnds.load(str(run.target))

    def norm(tensors: dict[str, Tensor]) -> None:
        with torch.no_grad():
            tensors["hidden.last.pre_norm"] = ends.final_norm(tensors["hidden.last.pre_norm"]).clone()

    found = look(run.train, cache=str(plant(norm)), ends_only=ends_only, skip=skip_all_but("re-projection", "states"))
    assert found["re-projection"]["verdict"] == "fault"
    assert "as if after the final norm" in found["re-projection"]["remedy"]
    if not ends_only:
        assert found["states"]["verdict"] == "fault"
        assert "is last.pre_norm after the final norm" in found["states"]["details"][0]


@pytest.mark.parametrize(("shift", "named"), [(1, "one token late"), (-1, "one token early")])
@pytest.mark.parametrize("ends_only", [False, True])
def test_states_that_lie_one_token_off(
    run: Run, look: Callable[..., Found], plant: Callable[..., Path], shift: int, named: str, ends_only: bool
) -> None:
    def move(tensors: dict[str, Tensor]) -> None:
        tensors["hidden.last.pre_norm"] = tensors["hidden.last.pre_norm"].roll(shift, 0)

    found = look(run.train, cache=str(plant(move)), ends_only=ends_only, skip=["overfit"])
    assert found["re-projection"]["verdict"] == "fault"
    assert named in found["re-projection"]["remedy"]
    # The drafter learnt from sound states: it is right where they are moved back.
    assert found["shifts"]["verdict"] == "fault"
    assert f"states moved by {shift:+d}" in found["shifts"]["remedy"]
    assert "token apart" in found["shifts"]["remedy"]
    if not ends_only:
        assert f"is last.pre_norm, {named}" in found["states"]["details"][0]


def test_another_layer_under_the_last_ones_name(
    run: Run, look: Callable[..., Found], plant: Callable[..., Path]
) -> None:
    def slip(tensors: dict[str, Tensor]) -> None:
        tensors["hidden.last.pre_norm"], tensors["hidden.layer.0.output"] = (
            tensors["hidden.layer.0.output"],
            tensors["hidden.last.pre_norm"],
        )

    found = look(run.train, cache=str(plant(slip)), skip=skip_all_but("states", "re-projection"))
    assert found["states"]["verdict"] == "fault"
    assert any("calls last.pre_norm is layer.0.output" in line for line in found["states"]["details"])
    assert "taken from layer.0.output" in found["re-projection"]["remedy"]


def test_states_that_are_no_ones(run: Run, look: Callable[..., Found], plant: Callable[..., Path]) -> None:
    def noise(tensors: dict[str, Tensor]) -> None:
        tensors["hidden.last.pre_norm"] = torch.randn_like(tensors["hidden.last.pre_norm"])

    found = look(run.train, cache=str(plant(noise)), skip=skip_all_but("states", "re-projection"))
    assert faults(found) == ["states", "re-projection"]
    assert "is no layer of this target" in found["states"]["details"][0]


@pytest.mark.parametrize(
    ("value", "named"), [(float("nan"), "NaN or infinity"), (0.0, "all zeros"), (1.5, "the same state at all")]
)
def test_states_that_cannot_be_states(
    run: Run, look: Callable[..., Found], plant: Callable[..., Path], value: float, named: str
) -> None:
    def spoil(tensors: dict[str, Tensor]) -> None:
        tensors["hidden.layer.0.output"][:] = value

    found = look(run.train, cache=str(plant(spoil)), skip=skip_all_but("sound-states"))
    assert found["sound-states"]["verdict"] == "fault"
    assert named in found["sound-states"]["measured"]


def test_labels_on_the_prompts_only(run: Run, look: Callable[..., Found], plant: Callable[..., Path]) -> None:
    def invert(tensors: dict[str, Tensor]) -> None:
        tensors["loss_mask"] = ~tensors["loss_mask"]

    found = look(run.train, cache=str(plant(invert)), skip=skip_all_but("labels"))
    assert found["labels"]["verdict"] == "fault"
    assert any("the labels lie on the prompts" in line for line in found["labels"]["details"])


@pytest.mark.parametrize(
    ("mask", "verdict", "named"),
    [
        (lambda mask: mask & (torch.arange(len(mask)) % 200 == 0), "fault", "of the tokens are trained on"),
        (lambda mask: torch.ones_like(mask), "warning", "prompts seem to be labelled"),
    ],
)
def test_too_few_and_too_many_labels(
    run: Run,
    look: Callable[..., Found],
    plant: Callable[..., Path],
    mask: Callable[[Tensor], Tensor],
    verdict: str,
    named: str,
) -> None:
    def relabel(tensors: dict[str, Tensor]) -> None:
        tensors["loss_mask"] = mask(tensors["loss_mask"])

    found = look(run.train, cache=str(plant(relabel)), skip=skip_all_but("labels"))
    assert found["labels"]["verdict"] == verdict
    assert any(named in line for line in found["labels"]["details"])


@pytest.mark.parametrize(("labelled", "times"), [(True, 0), (False, 1)])
def test_replies_whose_end_is_not_labelled(
    run: Run, look: Callable[..., Found], plant: Callable[..., Path], labelled: bool, times: int
) -> None:
    def end_all(tensors: dict[str, Tensor]) -> None:
        last = tensors["offsets"][1:] - 1
        tensors["input_ids"][last] = EOS
        tensors["loss_mask"][last] = labelled

    found = look(run.train, cache=str(plant(end_all)), skip=skip_all_but("labels"))["labels"]
    assert sum("no end token is labelled" in line for line in found["details"]) == times


def test_foreign_text(run: Run, look: Callable[..., Found], tmp_path: Path) -> None:
    rows = [json.loads(line) for line in run.prompts.read_text().splitlines()]
    for row in rows:
        row["messages"].append({"role": "assistant", "content": "He has seven apples and four pears now."})
    (tmp_path / "foreign.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    extract(str(run.target), tmp_path / "foreign.jsonl", tmp_path / "foreign", storage=StorageOptions(dtype="float32"))
    only = skip_all_but("own-text", "states", "re-projection")
    found = look(run.train, cache=str(tmp_path / "foreign"), skip=only)
    assert faults(found) == ["own-text"]  # the states are sound
    assert "data respond" in found["own-text"]["remedy"]
    by_ends = look(run.train, cache=str(tmp_path / "foreign"), ends_only=True, skip=only)
    assert by_ends["own-text"]["verdict"] == "fault"
    assert (
        "only a forward can tell" in by_ends["re-projection"]["remedy"] or by_ends["re-projection"]["verdict"] == "ok"
    )


def test_states_that_are_no_ones_do_not_excuse_foreign_text_as_sampled(
    run: Run, look: Callable[..., Found], tmp_path: Path
) -> None:
    rows = [json.loads(line) for line in (run.replies / "responses.jsonl").read_text().splitlines()]
    generator = torch.Generator().manual_seed(5)
    for row in rows:
        for turn in row["turns"]:
            turn["reply_ids"] = torch.randint(5, 300, (len(turn["reply_ids"]),), generator=generator).tolist()
    (tmp_path / "foreign.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    folder = tmp_path / "cache"
    extract(str(run.target), tmp_path / "foreign.jsonl", folder, storage=StorageOptions(dtype="float32"))
    only = skip_all_but("own-text", "re-projection")
    fresh = look(run.train, cache=str(folder), skip=only)["own-text"]
    manifest = json.loads((folder / "manifest.json").read_text())
    for record in manifest["shards"]:
        path = folder / record["name"]
        with safe_open(path, "pt") as file:
            metadata = file.metadata()
        tensors = dict(load_file(path))
        tensors["hidden.last.pre_norm"] = torch.randn(tensors["hidden.last.pre_norm"].shape, generator=generator)
        save_file(tensors, path, metadata)
        record["num_bytes"] = path.stat().st_size
    (folder / "manifest.json").write_text(json.dumps(manifest))
    found = look(run.train, cache=str(folder), skip=only)
    assert found["re-projection"]["verdict"] == "fault"
    assert found["own-text"]["verdict"] == fresh["verdict"] == "fault"
    assert found["own-text"]["figures"] == pytest.approx(fresh["figures"])


def test_an_evaluation_prompt_in_the_training_text(run: Run, look: Callable[..., Found], tmp_path: Path) -> None:
    rows = run.held_out.read_text().splitlines() + run.prompts.read_text().splitlines()[3:4]
    (tmp_path / "test.jsonl").write_text("\n".join(rows) + "\n")
    found = look(run.train, prompts=tmp_path / "test.jsonl", skip=skip_all_but("overlap"))["overlap"]
    assert found["verdict"] == "fault"
    assert found["figures"]["seen"] == 1
    assert found["details"][0].startswith("p3: 100%")
    assert "training sample p3" in found["details"][0]


def test_rows_of_another_split_than_the_caches_were_not_trained_on(
    run: Run, look: Callable[..., Found], tmp_path: Path
) -> None:
    rows = [json.loads(line) for line in (run.replies / "responses.jsonl").read_text().splitlines()]
    for number, row in enumerate(rows):
        row["split"] = "test" if number % 4 == 0 else "train"
    (tmp_path / "text.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    asked = {row["id"] for row in rows if row["split"] == "test"}
    prompts = [line for line in run.prompts.read_text().splitlines() if json.loads(line)["id"] in asked]
    (tmp_path / "test.jsonl").write_text("\n".join(prompts) + "\n")
    extract(
        str(run.target),
        tmp_path / "text.jsonl",
        tmp_path / "cache",
        split="train",
        storage=StorageOptions(dtype="float32"),
    )
    options = {"cache": str(tmp_path / "cache"), "skip": skip_all_but("overlap", "duplicates")}
    found = look(run.train, prompts=tmp_path / "test.jsonl", source=tmp_path / "text.jsonl", **options)
    assert found["overlap"]["verdict"] != "fault"
    assert found["overlap"]["figures"]["seen"] == 0
    assert found["duplicates"]["figures"]["samples"] == len(rows) - len(asked)
    found = look(run.train, prompts=tmp_path / "test.jsonl", source=run.prompts, **options)
    assert found["overlap"]["verdict"] == "fault"  # all of them are called train there
    (tmp_path / "bare.jsonl").write_text(json.dumps(rows[0] | {"split": "validation"}) + "\n")
    found = look(run.train, prompts=tmp_path / "test.jsonl", source=tmp_path / "bare.jsonl", **options)
    assert [found[name]["verdict"] for name in ("overlap", "duplicates")] == ["not checked"] * 2
    assert "no row in split 'train'" in found["overlap"]["measured"]


def test_replies_that_end_in_a_loop(run: Run, look: Callable[..., Found], plant: Callable[..., Path]) -> None:
    def repeat(tensors: dict[str, Tensor]) -> None:
        for stop in tensors["offsets"][1:].tolist():
            tensors["input_ids"][stop - 20 : stop] = torch.tensor([7, 8] * 10)

    only = skip_all_but("loops")
    assert look(run.train, cache=str(plant(repeat)), skip=only)["loops"]["figures"]["looping"] == 16
    assert look(run.train, skip=only)["loops"]["figures"]["looping"] < 16


def test_samples_that_occur_twice(run: Run, look: Callable[..., Found], plant: Callable[..., Path]) -> None:
    def repeat(tensors: dict[str, Tensor]) -> None:
        tensors["input_ids"][:] = 7  # samples of equal length become equal

    found = look(run.train, cache=str(plant(repeat)), skip=skip_all_but("duplicates"))["duplicates"]
    assert found["verdict"] == "warning"
    assert found["figures"]["repeated"] > 0


def test_prompts_longer_than_anything_trained_on(run: Run, look: Callable[..., Found], tmp_path: Path) -> None:
    (tmp_path / "long.jsonl").write_text(json.dumps({"id": "long", "prompt_ids": [5] * 240}) + "\n")
    found = look(run.train, prompts=tmp_path / "long.jsonl", skip=skip_all_but("prompt-length"))["prompt-length"]
    assert found["verdict"] == "fault"
    assert "--max-length" in found["remedy"]
