"""`draftsmith doctor` from outside: a healthy run has no fault, and each planted fault is found, named and answered.

The run is a whole one of tiny size: prompts, greedy replies, cache, training, export. Faults are planted in copies of its files.
"""

from __future__ import annotations

import itertools
import json
import re
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import fsspec
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny import EOS, save_target
from torch import Tensor
from training import make_trainer
from transformers import LlamaForCausalLM

from draftsmith import provenance
from draftsmith.cli import main
from draftsmith.data.cache.extract import StorageOptions, extract
from draftsmith.data.prompts import PromptSelection
from draftsmith.data.replies.reply_settings import Overrides
from draftsmith.data.replies.respond import respond
from draftsmith.decode.sampling import ReplyOptions
from draftsmith.evaluate.doctor import overfit as doctor_overfit
from draftsmith.evaluate.doctor.case import Use, find
from draftsmith.evaluate.doctor.doctor_command import NAMES, Bounds, doctor, gather
from draftsmith.evaluate.doctor.states import as_named
from draftsmith.export.export_command import export
from draftsmith.models import Eagle, Eagle3, ReDrafter, Target, TargetEnds
from draftsmith.models.families.redrafter import ReDrafterFamily
from draftsmith.models.files.fingerprint import tokenizer_fingerprint
from draftsmith.models.files.loading import load_tokenizer
from draftsmith.models.target.options import DEFAULTS, TargetOptions
from draftsmith.models.target.prompt_template import TemplateChoice
from draftsmith.train.batches.data_module import CacheDataModule
from draftsmith.train.drafter.module import DraftModule
from draftsmith.train.drafter.starting_drafter import LoraSettings
from draftsmith.train.drafter_callbacks.keep_best_drafter import KeepBestDrafter

WORDS = ["Tom", "Ann", "has", "buys", "three", "four", "seven", "apples", "pears", "more", "now", "how", "many", "does"]
Change = Callable[[dict[str, Tensor]], None]
Found = dict[str, dict[str, Any]]


@dataclass(frozen=True)
class Run:
    """Folders of one small training, from the target to the export."""

    target: Path
    prompts: Path
    held_out: Path
    replies: Path
    cache: Path
    train: Path
    exported: Path


def write_prompts(path: Path, first: int, count: int) -> Path:
    generator = torch.Generator().manual_seed(first)
    rows = []
    for number in range(first, first + count):
        words = [WORDS[place] for place in torch.randint(len(WORDS), (24,), generator=generator).tolist()]
        messages = [{"role": "user", "content": " ".join(words)}]
        rows.append({"id": f"p{number}", "messages": messages, "split": "train", "source": "made"})
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    folder = tmp_path_factory.mktemp("doctor")
    target = save_target(folder / "target")
    model = LlamaForCausalLM.from_pretrained(target)
    with torch.no_grad():  # with weights of one, norming twice would change nothing
        model.model.norm.weight.copy_(torch.linspace(0.2, 3.0, 32)[torch.randperm(32)])
    model.save_pretrained(target)
    prompts = write_prompts(folder / "train.jsonl", 0, 16)
    respond(
        str(target),
        prompts,
        folder / "replies",
        reply=ReplyOptions(max_new_tokens=32),
        sampling=Overrides(temperature=0.0),
    )
    extract(
        str(target),
        folder / "replies",
        folder / "cache",
        storage=StorageOptions(dtype="float32", layers=("last.pre_norm", "layer.0.output")),
    )
    module = DraftModule(str(target), ReDrafterFamily(exit_dim=64), num_steps=2, lr=5e-3)
    data = CacheDataModule(folder / "cache", val_fraction=0.1, tokens_per_batch=500)
    torch.manual_seed(0)
    make_trainer(folder / "train", max_epochs=100, check_val_every_n_epoch=100, callbacks=[KeepBestDrafter()]).fit(
        module, data
    )
    export(folder / "train" / "drafter", folder / "export")
    held_out = write_prompts(folder / "test.jsonl", 1000, 8)
    return Run(target, prompts, held_out, folder / "replies", folder / "cache", folder / "train", folder / "export")


@pytest.fixture
def look(tmp_path: Path) -> Callable[..., Found]:
    """look(drafter, **options): the findings of the command, by name."""

    def call(drafter: Path | str, **options: Any) -> Found:
        report = tmp_path / "report.json"
        try:
            doctor(str(drafter), out=report, **options)
        except ValueError as error:
            if "checks found a fault" not in str(error):
                raise
        return {one["name"]: one for one in json.loads(report.read_text())["findings"]}

    return call


@pytest.fixture
def plant(run: Run, tmp_path: Path) -> Callable[..., Path]:
    """plant(change): a copy of the run's cache whose tensors `change` has altered in place."""

    def copy(change: Change, **identity: object) -> Path:
        folder = tmp_path / "planted"
        shutil.copytree(run.cache, folder)
        manifest = json.loads((folder / "manifest.json").read_text())
        labelled = 0
        for record in manifest["shards"]:
            path = folder / record["name"]
            with safe_open(path, "pt") as file:
                metadata = file.metadata()
            tensors = {name: tensor.clone() for name, tensor in load_file(path).items()}
            change(tensors)
            save_file(tensors, path, metadata)
            record["num_bytes"] = path.stat().st_size
            record["num_labelled"] = int(tensors["loss_mask"].sum())
            labelled += record["num_labelled"]
        manifest["num_labelled"] = labelled
        manifest["identity"] |= identity
        (folder / "manifest.json").write_text(json.dumps(manifest))
        return folder

    return copy


def skip_all_but(*names: str) -> list[str]:
    return [name for name in NAMES if name not in names]


def faults(found: Found) -> list[str]:
    return [name for name, one in found.items() if one["verdict"] == "fault"]


# ---- a healthy run


def test_a_healthy_run_has_no_fault(run: Run, look: Callable[..., Found], capsys: pytest.CaptureFixture[str]) -> None:
    found = look(run.train, prompts=run.held_out, use=Use(draft_length=2, temperature=0.0))
    assert list(found) == list(NAMES)
    assert faults(found) == []
    unchecked = [name for name, one in found.items() if one["verdict"] == "not checked"]
    assert unchecked == []
    assert found["re-projection"]["figures"]["as named"] == 1.0
    assert found["shifts"]["figures"]["labels +0"] > 0.5
    assert found["train-serve"]["figures"]["agreement"] == 1.0
    # Greedy chains on greedy replies: the promise is not an estimate.
    assert found["acceptance"]["figures"]["trained prompts"] == pytest.approx(
        found["acceptance"]["figures"]["promised"]
    )
    assert all(one["remedy"] for one in found.values() if one["verdict"] == "warning")
    text = capsys.readouterr().out
    assert "re-projection" in text
    assert "<|user|>" in text
    assert "«" in text  # what is trained on is marked


def test_its_export_is_held_to_the_folder_that_it_was_made_of(run: Run, look: Callable[..., Found]) -> None:
    found = look(run.exported, skip=skip_all_but("drafter-file", "train-serve", "shifts"))
    assert [found[name]["verdict"] for name in ("drafter-file", "train-serve", "shifts")] == ["ok"] * 3
    assert str(run.train / "drafter") in found["drafter-file"]["measured"]


def test_the_ends_alone_find_the_same_without_a_forward(run: Run, look: Callable[..., Found]) -> None:
    found = look(run.train, ends_only=True, skip=["overfit"])
    assert faults(found) == []
    assert found["re-projection"]["verdict"] == "ok"
    assert found["states"]["verdict"] == "not checked"
    assert "--ends-only" in found["states"]["measured"]


def test_the_command_exits_with_1_where_something_is_at_fault(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["doctor", "--drafter", str(run.train), "--skip", *skip_all_but("fingerprints")]
    assert main(words) == 0
    assert f"1 ok, {len(NAMES) - 1} not checked" in capsys.readouterr().out
    assert main([*words, "--target", str(run.target), "--cache", str(run.replies)]) == 1
    assert "no hidden-state cache" in capsys.readouterr().err


def test_the_same_seed_draws_the_same_samples(run: Run, look: Callable[..., Found]) -> None:
    only = skip_all_but("shifts", "sound-states")
    first, again = (look(run.train, bounds=Bounds(samples=5, seed=3), skip=only) for _ in range(2))
    assert first == again
    assert first["sound-states"]["figures"]["samples"] == 5


@pytest.mark.parametrize("dtype", ["bfloat16", "float8_e4m3"])
def test_a_cache_of_fewer_bits_is_no_fault(run: Run, look: Callable[..., Found], tmp_path: Path, dtype: Any) -> None:
    extract(str(run.target), run.replies, tmp_path / "narrow", storage=StorageOptions(dtype=dtype))
    found = look(run.train, cache=str(tmp_path / "narrow"), skip=["overfit"])
    assert faults(found) == []
    assert [found[name]["verdict"] for name in ("states", "re-projection", "own-text")] == ["ok"] * 3


@pytest.mark.parametrize("family", ["eagle", "eagle3"])
def test_every_family_can_be_looked_at(run: Run, look: Callable[..., Found], tmp_path: Path, family: str) -> None:
    layers = ["layer.0.output", "layer.1.output", "last.pre_norm"]
    extract(
        str(run.target), run.replies, tmp_path / "cache", storage=StorageOptions(dtype="float32", layers=tuple(layers))
    )
    ends = TargetEnds.load(str(run.target))
    torch.manual_seed(0)
    ids = torch.tensor(sorted({*labelled_ids(run), EOS}))
    drafter = (
        Eagle.for_target(ends, num_draft_steps=3)
        if family == "eagle"
        else Eagle3.for_target(ends, layers=layers, draft_token_ids=ids)
    )
    drafter.save_pretrained(tmp_path / "drafter")
    found = look(tmp_path / "drafter", cache=str(tmp_path / "cache"))
    assert set(faults(found)) <= {"shifts"}  # it is fresh: an EAGLE-1 begins by handing on the state that it is given
    for name in ("overfit", "train-serve", "acceptance", "draft-vocabulary"):
        assert found[name]["verdict"] == "ok", found[name]


def test_a_run_with_the_target_in_the_loop_is_looked_at_through_fresh_states(
    run: Run, look: Callable[..., Found], plant: Callable[..., Path]
) -> None:
    def forget(tensors: dict[str, Tensor]) -> None:
        for name in [name for name in tensors if name.startswith("hidden.")]:
            del tensors[name]

    tokens = str(plant(forget, layers=[]))
    found, whole = look(run.train, cache=tokens), look(run.train)
    assert faults(found) == []
    assert [found[name]["verdict"] for name in ("sound-states", "states", "re-projection")] == ["not checked"] * 3
    for name in ("labels", "own-text", "shifts", "steps", "train-serve", "acceptance"):
        assert found[name]["figures"] == pytest.approx(whole[name]["figures"], abs=1e-4)
    assert "--ends-only" in look(run.train, cache=tokens, ends_only=True)["shifts"]["measured"]


def test_a_cache_behind_a_url_is_sampled_and_not_read_whole(
    run: Run, look: Callable[..., Found], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "fetched"))
    folder = fsspec.filesystem("memory")
    for file in run.cache.iterdir():
        folder.pipe_file(f"/doctor/{file.name}", file.read_bytes())
    rows = run.held_out.read_text().splitlines() + run.prompts.read_text().splitlines()[:1]
    (tmp_path / "test.jsonl").write_text("\n".join(rows) + "\n")
    options = {"cache": "memory://doctor", "prompts": tmp_path / "test.jsonl", "skip": ["overfit", "acceptance"]}
    found = look(run.train, **options)
    assert faults(found) == []
    assert found["states"]["verdict"] == "ok"
    assert "--source" in found["overlap"]["measured"]
    found = look(run.train, **options, source=run.replies)
    assert faults(found) == ["overlap"]
    assert found["duplicates"]["verdict"] == "ok"


# ---- planted faults in the cache


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


# ---- planted faults in the drafter


def save_drafter(run: Run, folder: Path, draft_ids: list[int] | None = None) -> Path:
    ends = TargetEnds.load(str(run.target))
    ids = None if draft_ids is None else torch.tensor(draft_ids)
    own = tokenizer_fingerprint(load_tokenizer(str(run.target)))
    ReDrafter.for_target(ends, draft_token_ids=ids, tokenizer_fingerprint=own).save_pretrained(folder)
    shutil.copy(run.train / "drafter" / provenance.FILE_NAME, folder)
    return folder


def labelled_ids(run: Run) -> list[int]:
    [shard] = run.cache.glob("shard-*.safetensors")
    tensors = load_file(shard)
    return tensors["input_ids"][tensors["loss_mask"]].tolist()


def test_a_poor_draft_vocabulary(run: Run, look: Callable[..., Found], tmp_path: Path) -> None:
    used = sorted(set(labelled_ids(run)))
    folder = save_drafter(run, tmp_path / "poor", used[: len(used) // 2])
    found = look(folder, skip=skip_all_but("draft-vocabulary"))["draft-vocabulary"]
    covered = sum(token in used[: len(used) // 2] for token in labelled_ids(run)) / len(labelled_ids(run))
    assert found["verdict"] == "fault"
    assert found["figures"]["covered"] == pytest.approx(covered)
    assert f"right more often than {covered:.1%}" in found["remedy"]
    assert any("end token" in line for line in found["details"]) == (EOS not in used[: len(used) // 2])


def test_a_tampered_tensor_of_the_export(run: Run, look: Callable[..., Found], tmp_path: Path) -> None:
    folder = tmp_path / "tampered"
    shutil.copytree(run.exported, folder)
    tensors = load_file(folder / "model.safetensors")
    tensors["lm_head.2.weight"] = -tensors["lm_head.2.weight"]
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    found = look(folder, skip=skip_all_but("drafter-file", "train-serve"))
    assert faults(found) == ["drafter-file", "train-serve"]
    assert "lm_head.2.weight" in found["drafter-file"]["measured"]


def test_what_a_narrower_file_costs_is_measured(run: Run, look: Callable[..., Found], tmp_path: Path) -> None:
    folder = tmp_path / "narrow"
    shutil.copytree(run.exported, folder)
    tensors = {name: tensor.bfloat16() for name, tensor in load_file(folder / "model.safetensors").items()}
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    config = json.loads((folder / "config.json").read_text()) | {"dtype": "bfloat16"}
    (folder / "config.json").write_text(json.dumps(config))
    found = look(folder, skip=skip_all_but("drafter-file", "train-serve"))
    assert found["drafter-file"]["verdict"] == "ok"
    assert "trained float32, served bfloat16" in found["train-serve"]["measured"]
    assert found["train-serve"]["figures"]["max difference"] > 0


def test_a_drafter_that_does_not_serve_as_it_was_trained(run: Run, look: Callable[..., Found], tmp_path: Path) -> None:
    folder = tmp_path / "tampered"
    shutil.copytree(run.exported, folder)
    tensors = load_file(folder / "model.safetensors")
    tensors["lm_head.2.weight"] = -tensors["lm_head.2.weight"]
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    found = look(folder, skip=skip_all_but("acceptance"))["acceptance"]
    assert found["verdict"] == "fault"
    assert found["figures"]["trained prompts"] < 1.5 < found["figures"]["promised"]


def test_prompts_unlike_those_of_training_are_told_apart_from_a_fault(run: Run, look: Callable[..., Found]) -> None:
    found = look(run.train, prompts=run.held_out, skip=skip_all_but("acceptance"))["acceptance"]
    assert found["verdict"] == "warning"  # a random target's replies can be learnt by heart only
    assert "serves as trained" in found["remedy"]


def test_weights_that_diverged(run: Run, look: Callable[..., Found], tmp_path: Path) -> None:
    folder = tmp_path / "diverged"
    shutil.copytree(run.train / "drafter", folder)
    tensors = load_file(folder / "model.safetensors")
    tensors["rnn_u.bias"][0] = float("nan")
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    found = look(folder, skip=skip_all_but("drafter-file"))["drafter-file"]
    assert found["verdict"] == "fault"
    assert "rnn_u.bias" in found["measured"]


def test_a_drafter_that_has_learnt_nothing(run: Run, look: Callable[..., Found], tmp_path: Path) -> None:
    found = look(save_drafter(run, tmp_path / "fresh"), skip=skip_all_but("shifts", "steps"))
    assert found["steps"]["verdict"] == "warning"
    assert found["shifts"]["verdict"] in ("warning", "fault")


def test_a_drafter_that_learnt_from_the_state_that_holds_the_answer(
    run: Run, look: Callable[..., Found], tmp_path: Path
) -> None:
    """A fresh EAGLE-1 is such a drafter: shown the state one token ahead, it says what the target says there."""
    Eagle.for_target(TargetEnds.load(str(run.target))).save_pretrained(tmp_path / "ahead")
    found = look(tmp_path / "ahead", cache=str(run.cache), skip=skip_all_but("shifts"))["shifts"]
    assert found["verdict"] == "fault"
    assert found["figures"]["states +1"] > 0.8 > found["figures"]["states +0"]
    assert "this cache is sound" in found["remedy"]


def with_record(run: Run, folder: Path, **changes: object) -> Path:
    """The trained drafter, its training record altered."""
    shutil.copytree(run.train / "drafter", folder)
    record = provenance.read(folder)
    record["config"] |= changes
    write_record(folder, record)
    return folder


def write_record(folder: Path, record: dict[str, Any]) -> None:
    """In a folder whose record is another stage's, so no stage would write it."""
    (folder / provenance.FILE_NAME).write_text(json.dumps(record))


def test_a_learning_rate_that_learns_nothing(run: Run, look: Callable[..., Found], tmp_path: Path) -> None:
    found = look(with_record(run, tmp_path / "slow", lr=1e-7), skip=skip_all_but("overfit"))["overfit"]
    assert found["verdict"] == "fault"
    assert "the learning rate is the cause" in found["remedy"]


def test_a_sample_that_nobody_can_learn(run: Run, look: Callable[..., Found], plant: Callable[..., Path]) -> None:
    def scramble(tensors: dict[str, Tensor]) -> None:
        generator = torch.Generator().manual_seed(0)
        tensors["hidden.last.pre_norm"][:] = 0.0
        tensors["input_ids"] = 5 + torch.randint(2, tensors["input_ids"].shape, generator=generator).int()

    found = look(run.train, cache=str(plant(scramble)), skip=skip_all_but("overfit"), bounds=Bounds(overfit_steps=30))[
        "overfit"
    ]
    assert found["verdict"] == "fault"
    assert "do not fit together" in found["remedy"]


def test_another_target_and_another_template(run: Run, look: Callable[..., Found], tmp_path: Path) -> None:
    other = save_target(tmp_path / "other", seed=9)
    found = look(run.train, target=str(other), skip=skip_all_but("fingerprints", "states"))
    assert faults(found) == ["fingerprints", "states"]
    assert any("the cache names the target" in line for line in found["fingerprints"]["details"])
    shutil.copytree(run.target, tmp_path / "same")
    tokenizer = load_tokenizer(str(run.target))
    tokenizer.chat_template = "{{ messages[0]['content'] }}"
    tokenizer.save_pretrained(tmp_path / "same")
    found = look(run.train, target=str(tmp_path / "same"), skip=skip_all_but("fingerprints"))
    assert found["fingerprints"]["verdict"] == "warning"
    assert "rendered otherwise" in found["fingerprints"]["remedy"]


@pytest.fixture
def alike(run: Run, tmp_path: Path) -> Path:
    """A template file that renders as the tokenizer's own does."""
    path = tmp_path / "alike.jinja"
    path.write_text(load_tokenizer(str(run.target)).chat_template + "{# alike #}")
    return path


def test_a_cache_of_conversations_is_held_to_the_template_that_is_given(
    run: Run, look: Callable[..., Found], tmp_path: Path, alike: Path
) -> None:
    row = {"messages": [{"role": "user", "content": "Tom"}, {"role": "assistant", "content": "He has seven apples."}]}
    (tmp_path / "talk.jsonl").write_text(json.dumps(row) + "\n")
    only = skip_all_but("fingerprints")
    for template, measured in ((str(alike), "5 compared, all equal"), ("none", "5 compared, all equal")):
        cache = str(tmp_path / Path(template).stem)
        extract(str(run.target), tmp_path / "talk.jsonl", Path(cache), rendering=TemplateChoice(template=template))
        found = look(run.train, cache=cache, rendering=TemplateChoice(template=template), skip=only)["fingerprints"]
        assert (found["verdict"], found["measured"]) == ("ok", measured)
    found = look(run.train, cache=cache, rendering=TemplateChoice(template=str(alike)), skip=only)["fingerprints"]
    assert (found["verdict"], found["measured"]) == ("warning", "1 of 5 differ")
    found = look(run.train, cache=cache, skip=only)["fingerprints"]
    assert (found["verdict"], found["measured"]) == ("ok", "4 compared, all equal; chat template not compared")
    assert "give doctor the same --template" in found["details"][0]


def test_replies_kept_as_ids_are_held_to_the_template_that_they_were_rendered_by(
    run: Run, look: Callable[..., Found], tmp_path: Path, alike: Path
) -> None:
    only, equal = skip_all_but("fingerprints"), ("ok", "7 compared, all equal")
    replies, other = tmp_path / "replies", str(alike)
    respond(
        str(run.target),
        run.prompts,
        replies,
        reply=ReplyOptions(max_new_tokens=2),
        sampling=Overrides(temperature=0.0),
        selection=PromptSelection(limit=2),
        rendering=TemplateChoice(template=other),
    )

    def measured(cache: str, template: str | None) -> tuple[str, str]:
        found = look(run.train, cache=str(tmp_path / cache), rendering=TemplateChoice(template=template), skip=only)[
            "fingerprints"
        ]
        return found["verdict"], found["measured"]

    untold = ("ok", "6 compared, all equal; chat template not compared")
    for name, template in (("told", other), ("default", None)):
        extract(str(run.target), replies, tmp_path / name, rendering=TemplateChoice(template=template))
        assert measured(name, other) == equal
        assert measured(name, None) == untold
        assert measured(name, "none") == ("warning", "1 of 7 differ")
    extract(str(run.target), run.replies, tmp_path / "own", rendering=TemplateChoice(template=other))
    assert measured("own", None) == equal  # the replies were rendered by the tokenizer's


def test_states_of_few_bits_and_whole_weights_are_told_apart(
    run: Run, look: Callable[..., Found], plant: Callable[..., Path]
) -> None:
    cache = str(plant(lambda tensors: None, target_quantization="4bit"))
    found = look(run.train, cache=cache, skip=skip_all_but("fingerprints"))["fingerprints"]
    assert (found["verdict"], found["measured"]) == ("warning", "1 of 9 differ")
    assert f"the cache names the weights 4bit, {run.target} has whole" in found["details"]
    assert "--quantization" in found["remedy"]


def test_use_that_differs_from_training(run: Run, look: Callable[..., Found], tmp_path: Path) -> None:
    only = skip_all_but("draft-length", "temperature", "score-scale")
    found = look(run.train, use=Use(draft_length=8, temperature=1.0), skip=only)
    assert [found[name]["verdict"] for name in ("draft-length", "temperature")] == ["warning", "warning"]
    assert look(save_drafter(run, tmp_path / "fresh"), skip=only)["score-scale"]["verdict"] == "warning"


# ---- faults that must not be taken for others


def flip_samples(tensors: dict[str, Tensor]) -> None:
    """Exchanges labelled and unlabelled tokens in every other sample."""
    edges = tensors["offsets"].tolist()
    for start, stop in list(itertools.pairwise(edges))[::2]:
        tensors["loss_mask"][start:stop] = ~tensors["loss_mask"][start:stop]


def flip_ends(tensors: dict[str, Tensor]) -> None:
    """Exchanges them in the last half of every sample: what is left is the end of the prompt."""
    for start, stop in itertools.pairwise(tensors["offsets"].tolist()):
        middle = (start + stop) // 2
        tensors["loss_mask"][middle:stop] = ~tensors["loss_mask"][middle:stop]


def flip_here_and_there(tensors: dict[str, Tensor]) -> None:
    flipped = torch.rand(tensors["loss_mask"].shape, generator=torch.Generator().manual_seed(0)) < 0.5
    tensors["loss_mask"] ^= flipped


@pytest.mark.parametrize(
    ("flip", "named"),
    [
        (flip_samples, "in 8 of 16 samples"),
        (flip_ends, "in 16 of 16 samples"),
        (flip_here_and_there, "the mask is torn"),
    ],
)
def test_a_mask_that_is_half_wrong_is_not_taken_for_foreign_text(
    run: Run, look: Callable[..., Found], plant: Callable[..., Path], flip: Change, named: str
) -> None:
    found = look(run.train, cache=str(plant(flip)), skip=skip_all_but("labels", "own-text"))
    assert faults(found) == ["labels"]
    assert named in found["labels"]["details"][0]
    assert "see `labels`" in found["own-text"]["measured"]


def test_without_any_label_only_the_labels_are_blamed(
    run: Run, look: Callable[..., Found], plant: Callable[..., Path]
) -> None:
    cache = plant(lambda tensors: tensors["loss_mask"].zero_())
    assert faults(look(run.train, cache=str(cache))) == ["labels"]


def test_replies_that_were_cut_off_are_no_slip_of_the_mask(run: Run, look: Callable[..., Found]) -> None:
    found = look(run.train, skip=skip_all_but("labels"))["labels"]  # nobody of these 16 comes to an end in 32 tokens
    assert found["verdict"] == "warning"
    assert "--max-new-tokens" in found["remedy"]
    assert "chat template" not in found["remedy"]


def test_other_rounding_is_not_taken_for_a_drafter_that_serves_badly(run: Run, look: Callable[..., Found]) -> None:
    found = look(run.train, where=TargetOptions(dtype="bfloat16"), skip=skip_all_but("acceptance"))["acceptance"]
    assert found["verdict"] == "ok"
    assert found["figures"]["said again"] < 8  # the others took another turn, for which nothing was promised


def test_one_sound_layer_does_not_vouch_for_another(run: Run, plant: Callable[..., Path]) -> None:
    def move(tensors: dict[str, Tensor]) -> None:
        tensors["hidden.layer.0.output"] = tensors["hidden.layer.0.output"].roll(1, 0)

    inputs = find(str(run.train), str(plant(move)), None, None, None)
    case = gather(inputs, load_tokenizer(str(run.target)), Bounds(), False, DEFAULTS)
    assert as_named(case, ["last.pre_norm"])
    assert not as_named(case, ["last.pre_norm", "layer.0.output"])


def write_eagle3(run: Run, folder: Path, layers: list[str], recorded: list[str] | None = None) -> Path:
    Eagle3.for_target(TargetEnds.load(str(run.target)), layers=layers).save_pretrained(folder)
    record = {"target": str(run.target), "data": {"cache": str(run.cache)}, "drafter": {"layers": recorded}}
    provenance.write(folder, {"config": record})
    return folder


def test_layers_that_were_not_trained_on(run: Run, look: Callable[..., Found], tmp_path: Path) -> None:
    low, high, last = "layer.0.output", "layer.1.output", "last.pre_norm"
    only = skip_all_but("fingerprints")
    # The cache has the first and the last of them.
    found = look(write_eagle3(run, tmp_path / "moved", [high, low, last]), skip=only)["fingerprints"]
    assert found["verdict"] == "fault"
    assert found["measured"].startswith("the drafter reads layer.1.output; the cache has")
    folder = write_eagle3(run, tmp_path / "turned", [last, low], [low, last])
    assert "its training's record says layer.0.output" in look(folder, skip=only)["fingerprints"]["measured"]
    same = write_eagle3(run, tmp_path / "same", [low, last], [low, last])
    assert look(same, skip=only)["fingerprints"]["verdict"] == "ok"


def test_a_layer_that_the_target_has_not_leaves_the_other_checks_standing(
    run: Run, look: Callable[..., Found], plant: Callable[..., Path]
) -> None:
    def deeper(tensors: dict[str, Tensor]) -> None:
        tensors["hidden.layer.9.output"] = tensors.pop("hidden.layer.0.output")

    cache = plant(deeper, layers=["last.pre_norm", "layer.9.output"])
    found = look(run.train, cache=str(cache), skip=["overfit"])
    assert faults(found) == ["states"]
    assert "unknown layer 'layer.9.output'" in found["states"]["remedy"]


def test_an_end_token_that_the_text_does_not_use_may_be_missing_from_the_draft_vocabulary(
    run: Run, look: Callable[..., Found], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    known = sorted({*labelled_ids(run), EOS})
    other = next(token for token in range(5, 300) if token not in known)
    monkeypatch.setattr(Target, "eos_token_ids", (other, EOS))
    folder = save_drafter(run, tmp_path / "two-ends", known)
    assert look(folder, skip=skip_all_but("draft-vocabulary"))["draft-vocabulary"]["verdict"] == "ok"
    monkeypatch.setattr(Target, "eos_token_ids", (other,))
    found = look(folder, skip=skip_all_but("draft-vocabulary"))["draft-vocabulary"]
    assert found["verdict"] == "warning"
    assert any("no draft ever ends a reply" in line for line in found["details"])


def test_a_matrix_of_zeros_is_seen_without_anything_to_compare(
    run: Run, look: Callable[..., Found], tmp_path: Path
) -> None:
    folder = tmp_path / "zeroed"
    shutil.copytree(run.train / "drafter", folder)
    tensors = load_file(folder / "model.safetensors")
    tensors["rnn_u.weight"].zero_()
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    found = look(folder, skip=skip_all_but("drafter-file"))["drafter-file"]
    assert found["verdict"] == "warning"
    assert "rnn_u.weight" in found["measured"]


def test_an_export_that_is_damaged_is_not_called_diverged(run: Run, look: Callable[..., Found], tmp_path: Path) -> None:
    folder = tmp_path / "damaged"
    shutil.copytree(run.exported, folder)
    tensors = load_file(folder / "model.safetensors")
    tensors["rnn_u.bias"][0] = float("nan")
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    found = look(folder, skip=skip_all_but("drafter-file"))["drafter-file"]
    assert found["verdict"] == "fault"
    assert "export it again" in found["remedy"]
    assert "diverged" not in found["remedy"]


def test_an_export_whose_source_is_gone_says_that_nothing_was_compared(
    run: Run, look: Callable[..., Found], tmp_path: Path
) -> None:
    folder = tmp_path / "alone"
    shutil.copytree(run.exported, folder)
    record = provenance.read(folder) | {"inputs": {str(tmp_path / "gone" / "model.safetensors"): "0"}}
    write_record(folder, record)
    assert "not compared" in look(folder, skip=skip_all_but("drafter-file"))["drafter-file"]["measured"]


def test_an_adapter_and_its_export_are_looked_at_as_they_are(
    run: Run, look: Callable[..., Found], tmp_path: Path
) -> None:
    base, out = run.train / "drafter", tmp_path / "adapted"
    family = ReDrafterFamily(exit_dim=64)
    module = DraftModule(str(run.target), family, num_steps=2, lr=5e-3, init_from=base, lora=LoraSettings())
    data = CacheDataModule(run.cache, val_fraction=0.1, tokens_per_batch=500)
    make_trainer(out, max_epochs=2, check_val_every_n_epoch=2, callbacks=[KeepBestDrafter()]).fit(module, data)
    export(base, tmp_path / "export", drafter_adapter=out / "drafter")
    for folder in (out, tmp_path / "export"):
        found = look(folder, skip=["overlap", "duplicates"])
        assert faults(found) == []  # an export with an adapter is not what its base drafter was
        assert found["train-serve"]["verdict"] == "ok"


def test_an_overfit_that_takes_too_long_is_given_up(
    run: Run, look: Callable[..., Found], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(doctor_overfit, "_SECONDS", 0)
    found = look(run.train, skip=skip_all_but("overfit"))["overfit"]
    assert found["verdict"] == "not checked"
    assert "0 of 80 steps" in found["measured"]


# ---- folders and files in disorder


@pytest.mark.parametrize("content", [{"config": None}, {"config": {"data": None, "lr": None, "drafter": None}}])
def test_a_record_without_paths_leaves_what_the_folder_tells(
    run: Run, look: Callable[..., Found], tmp_path: Path, content: Any
) -> None:
    shutil.copytree(run.train / "drafter", tmp_path / "drafter")
    (tmp_path / "drafter" / provenance.FILE_NAME).write_text(json.dumps(content))
    found = look(tmp_path / "drafter")
    assert faults(found) == []
    assert "no cache is known" in found["states"]["measured"]
    found = look(tmp_path / "drafter", cache=str(run.cache), skip=["overlap", "duplicates"])
    assert faults(found) == []
    assert found["overfit"]["verdict"] == "ok"


def test_a_record_that_is_no_object_is_named(run: Run, tmp_path: Path) -> None:
    shutil.copytree(run.train / "drafter", tmp_path / "drafter")
    (tmp_path / "drafter" / provenance.FILE_NAME).write_text("[]")
    with pytest.raises(ValueError, match=r"provenance\.json is not a JSON object but list"):
        doctor(str(tmp_path / "drafter"))


def test_a_cache_that_was_deleted_is_named(run: Run, look: Callable[..., Found], tmp_path: Path) -> None:
    folder = with_record(run, tmp_path / "moved", data={"cache": "/gone/cache"})
    assert "/gone/cache" in look(folder, skip=skip_all_but("labels"))["labels"]["measured"]


def test_nothing_named_is_not_called_equal(run: Run, look: Callable[..., Found], tmp_path: Path) -> None:
    ReDrafter.for_target(TargetEnds.load(str(run.target))).save_pretrained(tmp_path / "unbound")
    config = json.loads((tmp_path / "unbound" / "config.json").read_text()) | {"target_fingerprint": ""}
    (tmp_path / "unbound" / "config.json").write_text(json.dumps(config))
    found = look(tmp_path / "unbound", target=str(run.target), skip=skip_all_but("fingerprints"))["fingerprints"]
    assert found["verdict"] == "not checked"


def test_weights_that_were_cut_off_are_answered_in_words(run: Run, tmp_path: Path) -> None:
    shutil.copytree(run.train / "drafter", tmp_path / "cut")
    whole = (tmp_path / "cut" / "model.safetensors").read_bytes()
    (tmp_path / "cut" / "model.safetensors").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=r"cut/model\.safetensors is cut off .*; export it again"):
        doctor(str(tmp_path / "cut"))


def test_a_drafter_that_is_not_whole_is_not_taken_for_another_layout(run: Run, tmp_path: Path) -> None:
    shutil.copytree(run.train / "drafter", tmp_path / "part")
    tensors = load_file(tmp_path / "part" / "model.safetensors")
    del tensors["rnn_u.bias"]
    save_file(tensors, tmp_path / "part" / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=r"rnn_u\.bias is missing") as caught:
        doctor(str(tmp_path / "part"))
    assert "another software" not in str(caught.value)


def test_ids_of_another_tokenizer_are_refused_before_the_target_reads_them(
    run: Run, plant: Callable[..., Path], tmp_path: Path
) -> None:
    def foreign(tensors: dict[str, Tensor]) -> None:
        tensors["input_ids"][0] = 5000

    with pytest.raises(ValueError, match=r"holds the token id 5000; ids must be .* below the vocabulary of 300"):
        doctor(str(run.train), cache=str(plant(foreign)))
    (tmp_path / "foreign.jsonl").write_text(json.dumps({"id": "a", "prompt_ids": [5, 999]}) + "\n")
    with pytest.raises(ValueError, match="has the token 999"):
        doctor(str(run.train), prompts=tmp_path / "foreign.jsonl")
    shutil.copytree(run.replies, tmp_path / "replies")
    settings = json.loads((tmp_path / "replies" / "settings.json").read_text()) | {"tokenizer_fingerprint": "0" * 64}
    (tmp_path / "replies" / "settings.json").write_text(json.dumps(settings))
    with pytest.raises(ValueError, match="holds token ids of the tokenizer 0000"):
        doctor(str(run.train), source=tmp_path / "replies")


def test_a_broken_line_of_the_text_is_left_out_and_named(
    run: Run, look: Callable[..., Found], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = (run.replies / "responses.jsonl").read_text()
    (tmp_path / "text.jsonl").write_text(rows + "{broken\n")
    found = look(run.train, source=tmp_path / "text.jsonl", skip=skip_all_but("labels", "duplicates"))
    assert "text.jsonl:17: not valid JSON" in "".join(capsys.readouterr())
    assert found["duplicates"]["verdict"] == "ok"
    assert found["labels"]["figures"]["labelled"] > 0


# ---- the page, and what cannot be looked at


def test_the_page_explains_every_check() -> None:
    page = (Path(__file__).resolve().parents[3] / "docs" / "how-to" / "measure" / "doctor.md").read_text(
        encoding="utf-8"
    )
    explained = re.findall(r"^\| `([a-z-]+)` \|", page, re.MULTILINE)
    assert sorted(explained) == sorted(NAMES)
    told = page.partition("## What each finding means")[2].partition("\n## ")[0]
    headings = ", ".join(re.findall(r"^\*\*(.*?)\.\*\*", told, re.MULTILINE))
    assert sorted(headings.split(", ")) == sorted(NAMES)


def test_a_draft_lm_is_told_what_does_not_concern_it(look: Callable[..., Found], run: Run) -> None:
    found = look(run.target, target=str(run.target), cache=str(run.cache), skip=["duplicates"])
    assert found["overfit"]["verdict"] == "not checked"
    assert "draft LM" in found["train-serve"]["measured"]
    assert found["own-text"]["verdict"] == "ok"


def test_without_a_cache_the_checks_that_need_one_say_so(run: Run, look: Callable[..., Found], tmp_path: Path) -> None:
    gone = {"data": {"cache": str(tmp_path / "gone")}}
    found = look(with_record(run, tmp_path / "moved", **gone), prompts=run.held_out)
    assert {name for name, one in found.items() if "--cache" in one["measured"]} >= {
        "states",
        "labels",
        "overfit",
        "overlap",
    }
    assert found["fingerprints"]["verdict"] == "ok"


def refusals() -> Iterator[tuple[str, dict[str, Any], str]]:
    yield "train", {"skip": ["overlaps"]}, "Did you mean overlap"
    yield "replies", {}, "holds no drafter"


@pytest.mark.parametrize(("place", "options", "message"), list(refusals()))
def test_mistakes_are_answered_in_words(run: Run, place: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        doctor(str(getattr(run, place)), **options)


def test_no_sample_is_too_few() -> None:
    with pytest.raises(ValueError, match="samples is 0"):
        Bounds(samples=0)


def test_a_folder_in_another_layout_is_shown_the_way(run: Run, tmp_path: Path) -> None:
    Eagle.for_target(TargetEnds.load(str(run.target))).save_pretrained(tmp_path / "drafter")
    export(tmp_path / "drafter", tmp_path / "served", str(run.target), layout="eagle")
    with pytest.raises(ValueError, match=r"draftsmith export --drafter .* --target TARGET"):
        doctor(str(tmp_path / "served"), target=str(run.target))


def test_the_target_is_loaded_once(run: Run, look: Callable[..., Found], monkeypatch: pytest.MonkeyPatch) -> None:
    loads: list[str] = []
    load = Target.load.__func__  # type: ignore[attr-defined]
    monkeypatch.setattr(Target, "load", classmethod(lambda cls, *a, **k: (loads.append(a[0]), load(cls, *a, **k))[1]))
    look(run.train, prompts=run.held_out)
    assert loads == [str(run.target)]
