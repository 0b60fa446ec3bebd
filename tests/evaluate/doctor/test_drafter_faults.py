"""Faults planted in a drafter, its training and its export: each is found, named and answered."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from doctor_runs import Found, Run, faults, labelled_ids, save_drafter, skip_all_but, with_record
from safetensors.torch import load_file, save_file
from tiny import EOS
from torch import Tensor

from draftsmith.evaluate.doctor.doctor_command import Bounds
from draftsmith.models import Eagle, TargetEnds


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
