"""One small run, from prompts to export, and faults planted in copies of its cache."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from doctor_runs import Change, Found, Run, write_prompts
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny import save_target
from training import make_trainer
from transformers import LlamaForCausalLM

from draftsmith.data.cache.extract import extract
from draftsmith.data.cache.extraction import StorageOptions
from draftsmith.data.replies.reply_settings import SamplingOverrides
from draftsmith.data.replies.respond import respond
from draftsmith.decode.sampling import ReplyOptions
from draftsmith.evaluate.doctor.doctor_command import doctor
from draftsmith.export.export_command import export
from draftsmith.models.families.redrafter import ReDrafterFamily
from draftsmith.train.batches.data_module import CacheDataModule
from draftsmith.train.drafter.module import DraftModule
from draftsmith.train.drafter_callbacks.keep_best_drafter import KeepBestDrafter


@pytest.fixture(scope="session")
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
        sampling=SamplingOverrides(temperature=0.0),
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
