"""Faults that must not be taken for others."""

from __future__ import annotations

import itertools
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from doctor_runs import Change, Found, Run, faults, labelled_ids, save_drafter, skip_all_but, write_record
from safetensors.torch import load_file, save_file
from tiny import EOS
from torch import Tensor
from training import make_trainer

from draftsmith import provenance
from draftsmith.evaluate.doctor import overfit as doctor_overfit
from draftsmith.evaluate.doctor.case import find
from draftsmith.evaluate.doctor.doctor_command import Bounds, gather
from draftsmith.evaluate.doctor.states import as_named
from draftsmith.export.export_command import export
from draftsmith.models import Eagle3, Target, TargetEnds
from draftsmith.models.families.redrafter import ReDrafterFamily
from draftsmith.models.files.loading import load_tokenizer
from draftsmith.models.target.options import DEFAULTS, TargetOptions
from draftsmith.train.batches.data_module import CacheDataModule
from draftsmith.train.drafter.module import DraftModule
from draftsmith.train.drafter.starting_drafter import LoraSettings
from draftsmith.train.drafter_callbacks.keep_best_drafter import KeepBestDrafter


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
