"""LoRA on a trained drafter: nothing else moves, runs resume bitwise, and what is kept is a small folder bound to its drafter."""

import copy
import importlib
import json
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from pytorch_lightning.callbacks import ModelCheckpoint
from safetensors.torch import load_file
from tiny import save_target
from training import KeepLosses, MakeCache, make_module, make_trainer, tiny_config
from transformers import AutoModelForCausalLM

from draftsmith.cli import main
from draftsmith.decode.decode_command import prompt_ids
from draftsmith.models.drafters.drafter_folder import load_drafter
from draftsmith.models.drafters.family import DrafterFamily
from draftsmith.models.families.eagle import EagleFamily
from draftsmith.models.families.eagle3 import Eagle3Family
from draftsmith.models.families.redrafter import ReDrafterFamily
from draftsmith.models.files.fingerprint import module_fingerprint
from draftsmith.models.files.loading import load_tokenizer
from draftsmith.models.lora.lora_adapter import LoraSettings, merge_adapter, read_bond
from draftsmith.models.target.target import PRE_NORM, Target
from draftsmith.train.batches.data_module import CacheDataModule
from draftsmith.train.drafter.module import DraftModule
from draftsmith.train.drafter_callbacks.keep_best_drafter import KeepBestDrafter
from draftsmith.train.drafter_callbacks.tree_decode_validation import TreeDecodeValidation

SCRIPT = Path(__file__).resolve().parents[3] / "train.py"
LAYERS = ("layer.0.output", PRE_NORM)
LORA = LoraSettings(rank=2, alpha=4.0)
FAMILIES: dict[str, tuple[DrafterFamily, dict[str, Any]]] = {
    "redrafter": (ReDrafterFamily(draft_vocab_size=30), {}),
    "eagle": (EagleFamily(), {"distillation": "path", "feature_weight": 1.0, "logit_weight": 0.1, "num_steps": 2}),
    "eagle3": (Eagle3Family(layers=list(LAYERS)), {"distillation": "path"}),
}


@pytest.fixture(scope="module")
def cache(make_cache: MakeCache) -> Path:
    return make_cache([12] * 40, layers=LAYERS)


def data_of(cache: Path) -> CacheDataModule:
    return CacheDataModule(cache, val_fraction=0.1, tokens_per_batch=60)


@pytest.fixture(scope="module")
def trained(target_dir: Path, cache: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Folders of drafters, one a family, that have seen a few batches."""
    folders = {}
    for name, (family, settings) in FAMILIES.items():
        folders[name] = tmp_path_factory.mktemp(name) / "drafter"
        module = make_module(target_dir, drafter=family, **settings)
        trainer = make_trainer(folders[name].parent, max_steps=4, callbacks=[KeepBestDrafter(folders[name])])
        trainer.fit(module, data_of(cache))
    return folders


@pytest.mark.parametrize("name", FAMILIES)
def test_only_the_adapter_learns_and_its_folder_gives_the_drafter_that_was_evaluated(
    target_dir: Path, cache: Path, trained: dict[str, Path], tmp_path: Path, name: str
) -> None:
    family, settings = FAMILIES[name]
    module = make_module(target_dir, drafter=family, init_from=trained[name], lora=LORA, lr=3e-2, **settings)
    losses: list[float] = []
    callbacks = [TreeDecodeValidation(2, 8, draft_length=3), KeepBestDrafter(monitor="the last"), KeepLosses(losses)]
    trainer = make_trainer(tmp_path, max_epochs=6, callbacks=callbacks)
    trainer.fit(module, data_of(cache))
    assert sum(losses[-6:]) < 0.9 * sum(losses[:6])
    below = load_drafter(trained[name]).state_dict()
    drafter = module.evaluated
    moved = [
        path
        for path, weight in drafter.state_dict().items()
        if ".lora_" not in path and not torch.equal(weight, below[path.replace(".base_layer", "")])
    ]
    assert moved == []
    [optimizer] = trainer.optimizers
    in_optimizer = {id(weight) for group in optimizer.param_groups for weight in group["params"]}
    assert in_optimizer == {id(weight) for path, weight in drafter.named_parameters() if ".lora_" in path}
    folder = tmp_path / "drafter"
    names = {path.name for path in folder.iterdir()}
    assert names == {"adapter_config.json", "adapter_model.safetensors", "bond.json", "provenance.json"}
    assert (folder / "adapter_model.safetensors").stat().st_size < 0.6 * (
        trained[name] / "model.safetensors"
    ).stat().st_size
    bond = read_bond(folder)
    assert bond.drafter_fingerprint == module_fingerprint(load_drafter(trained[name]))
    loaded = load_drafter(folder)
    loaded.attach(module.ends)
    assert loaded.config.score_scale == drafter.config.score_scale
    merged = merge_adapter(copy.deepcopy(drafter, {id(module.ends): module.ends}), "lora").state_dict()
    for path, weight in loaded.state_dict().items():
        torch.testing.assert_close(weight, merged[path])


class SaveEveryStep(ModelCheckpoint):
    def __init__(self, folder: Path) -> None:
        super().__init__(folder, filename="{step}", save_top_k=-1, every_n_train_steps=1)


def test_a_run_with_dropout_and_an_average_resumes_to_the_very_weights(
    target_dir: Path, cache: Path, trained: dict[str, Path], tmp_path: Path
) -> None:
    lora = LoraSettings(rank=2, dropout=0.3, target_modules=["rnn_u", "linear", "input_proj"])

    def fit(checkpoint: Path | None) -> DraftModule:
        module = make_module(
            target_dir, drafter=ReDrafterFamily(), init_from=trained["redrafter"], lora=lora, ema_decay=0.9
        )
        callbacks = [SaveEveryStep(tmp_path / ("steps" if checkpoint is None else "resumed"))]
        trainer = make_trainer(tmp_path, max_steps=8, max_epochs=-1, enable_checkpointing=True, callbacks=callbacks)
        trainer.fit(module, data_of(cache), ckpt_path=checkpoint)
        return module

    whole = fit(None)
    resumed = fit(tmp_path / "steps" / "step=5.ckpt")
    assert equal(whole.drafter, resumed.drafter)
    assert equal(whole.evaluated, resumed.evaluated)
    own, average = whole.drafter.state_dict(), whole.evaluated.state_dict()  # type: ignore[union-attr]
    differ = {name for name, value in average.items() if not torch.equal(value, own[name])}
    assert differ == {name for name in own if ".lora_" in name}, "the average follows the adapter, and that alone"


def equal(one: Any, other: Any) -> bool:
    found = other.state_dict()
    return all(torch.equal(value, found[name]) for name, value in one.state_dict().items())


def test_a_checkpoint_of_another_adapter_is_refused(
    target_dir: Path, cache: Path, trained: dict[str, Path], tmp_path: Path
) -> None:
    def fit(checkpoint: Path | None, **settings: Any) -> None:
        module = make_module(target_dir, drafter=ReDrafterFamily(), **settings)
        callbacks = [SaveEveryStep(tmp_path / "steps")]
        trainer = make_trainer(tmp_path, max_steps=2, enable_checkpointing=True, callbacks=callbacks)
        trainer.fit(module, data_of(cache), ckpt_path=checkpoint)

    other = load_drafter(trained["redrafter"])
    with torch.no_grad():
        other.get_parameter("rnn_w.weight").add_(0.1)
    other.save_pretrained(tmp_path / "other")
    fit(None, init_from=trained["redrafter"], lora=LORA)
    checkpoint = tmp_path / "steps" / "step=1.ckpt"
    mine = "the checkpoint trained an adapter .* of the drafter .*, this run trains"
    with pytest.raises(ValueError, match=f"{mine} an adapter"):
        fit(checkpoint, init_from=tmp_path / "other", lora=LORA)
    with pytest.raises(ValueError, match=f"{mine} an adapter .*alpha 99"):
        fit(checkpoint, init_from=trained["redrafter"], lora=replace(LORA, alpha=99.0))
    with pytest.raises(ValueError, match=f"{mine} all weights"):
        fit(checkpoint, init_from=trained["redrafter"])


@pytest.mark.parametrize(
    ("settings", "rule"),
    [
        ({"lora": LORA}, "init_from names none"),
        ({"allow_other_target": True}, "init_from, which is null"),
    ],
)
def test_what_needs_a_trained_drafter_says_so(target_dir: Path, settings: dict[str, Any], rule: str) -> None:
    with pytest.raises(ValueError, match=rule):
        make_module(target_dir, **settings)


def test_an_adapter_never_replaces_the_drafter_below_it(
    target_dir: Path, cache: Path, trained: dict[str, Path], tmp_path: Path
) -> None:
    base = shutil.copytree(trained["redrafter"], tmp_path / "drafter")
    module = make_module(target_dir, drafter=ReDrafterFamily(), init_from=base, lora=LORA)
    trainer = make_trainer(tmp_path, max_steps=1, callbacks=[KeepBestDrafter()])
    with pytest.raises(ValueError, match=r"reads .*drafter, and would delete it"):
        trainer.fit(module, data_of(cache))
    assert module_fingerprint(load_drafter(base)) == module_fingerprint(load_drafter(trained["redrafter"]))
    assert not list(tmp_path.glob(".drafter*"))


def test_a_frozen_head_stays_frozen_below_an_adapter(
    target_dir: Path, cache: Path, trained: dict[str, Path], tmp_path: Path
) -> None:
    family = ReDrafterFamily(freeze_head=True)
    module = make_module(target_dir, drafter=family, init_from=trained["redrafter"], lora=LORA)
    make_trainer(tmp_path, max_steps=1).fit(module, data_of(cache))
    assert not any("lm_head.2" in name and ".lora_" in name for name in module.state_dict())


@pytest.fixture(scope="module")
def tuned(target_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The target fine-tuned: another checkpoint of the same shape and tokenizer."""
    folder = tmp_path_factory.mktemp("tuned")
    model = AutoModelForCausalLM.from_pretrained(target_dir)
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(0.02 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(1)))
    model.save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).write_bytes((target_dir / name).read_bytes())
    return folder


@pytest.mark.parametrize("lora", [LORA, None], ids=["lora", "all weights"])
def test_a_drafter_of_the_base_may_start_for_a_fine_tuned_target_and_then_belongs_to_it(
    target_dir: Path,
    tuned: Path,
    make_cache: MakeCache,
    trained: dict[str, Path],
    tmp_path: Path,
    lora: LoraSettings | None,
) -> None:
    own = Target.load(str(tuned))
    cache = make_cache([12] * 20, fingerprint=own.fingerprint)

    def fit(**settings: Any) -> DraftModule:
        module = make_module(tuned, drafter=ReDrafterFamily(), init_from=trained["redrafter"], lora=lora, **settings)
        trainer = make_trainer(tmp_path, max_steps=2, callbacks=[KeepBestDrafter()])
        trainer.fit(module, data_of(cache))
        return module

    with pytest.raises(ValueError, match="was trained for target"):
        fit()
    fit(allow_other_target=True)
    drafter = load_drafter(tmp_path / "drafter")
    assert drafter.config.target_fingerprint == own.fingerprint
    drafter.attach(own.ends)
    with pytest.raises(ValueError, match="was trained for target"):
        drafter.attach(Target.load(str(target_dir)).ends)


def test_lora_is_a_few_lines_of_yaml(
    target_dir: Path, cache: Path, trained: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    extra = (
        f"    init_from: {trained['redrafter']}\n    lora: {{rank: 2, alpha: 4, target_modules: [rnn_w, lm_head.2]}}"
    )
    config = tiny_config(tmp_path, target_dir, cache, extra)
    assert main(["train", "fit", f"--config={config}", "--trainer.max_steps=2"]) == 0
    assert "rank: 2" in (tmp_path / "run" / "config.yaml").read_text()
    assert (tmp_path / "run" / "drafter" / "adapter_model.safetensors").is_file()
    with pytest.raises(SystemExit):
        main(["train", "fit", f"--config={config}", "--model.init_args.lora.rnk=2"])
    assert "Did you mean rank?" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_two_processes_train_the_adapter_that_one_does_whole_or_in_shares(
    target_dir: Path, make_cache: MakeCache, trained: dict[str, Path], tmp_path: Path
) -> None:
    cache = make_cache([7, 12, 9, 15, 8, 11, 14, 9, 10, 13, 8, 12])
    extra = f"    init_from: {trained['redrafter']}\n    lora: {{rank: 2, alpha: 4}}"
    engines = {
        "one": (1, "auto"),
        "ddp": (2, "ddp"),
        "fsdp2": (2, "{class_path: draftsmith.train.FullyShard}"),
    }
    found = {}
    for name, (devices, strategy) in engines.items():
        folder = tmp_path / name
        folder.mkdir()
        (folder / "engine.yaml").write_text(f"trainer: {{devices: {devices}, max_epochs: 1, strategy: {strategy}}}")
        configs = (tiny_config(folder, target_dir, cache, extra), folder / "engine.yaml")
        words = [*(f"--config={path}" for path in configs), f"--data.init_args.tokens_per_batch={40 // devices}"]
        done = subprocess.run([sys.executable, str(SCRIPT), "fit", *words], capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr[-3000:]
        found[name] = load_file(folder / "run" / "drafter" / "adapter_model.safetensors")
    one = found.pop("one")
    assert any(tensor.any() for name, tensor in one.items() if "lora_B" in name)
    for adapter in found.values():
        assert adapter.keys() == one.keys()
        for name, tensor in adapter.items():
            torch.testing.assert_close(tensor, one[name], rtol=1e-4, atol=1e-5)


@pytest.fixture
def benchmark() -> ModuleType:
    return importlib.import_module("benchmarks.drafters.lora")


def test_without_its_data_the_benchmark_says_so_and_ends(
    tmp_path: Path, benchmark: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["lora.py", "--data", str(tmp_path), "--work", str(tmp_path / "work")])
    assert benchmark.main() == 0
    assert "skipped:" in capsys.readouterr().out
    assert not (tmp_path / "work").exists()


def test_the_benchmark_compares_three_drafters_on_prompts_that_none_was_trained_on(
    tmp_path: Path, benchmark: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    save_target(tmp_path / "models" / "chat-6m")
    (tmp_path / "prompts").mkdir()
    (tmp_path / "text").mkdir()
    questions = [{"question": f"Tom has {number % 9} apples. How many?"} for number in range(20)]
    (tmp_path / "prompts" / "gsm8k_train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in questions))
    stories = "<|endoftext|>".join(f"Tom has apple {number}. He is glad." for number in range(9))
    (tmp_path / "text" / "tinystories_valid.txt").write_text(stories)
    monkeypatch.setitem(benchmark.SCALES, "small", benchmark.Scale(6, 3, 10, 2, 2))
    monkeypatch.setattr(sys, "argv", ["lora.py", "--data", str(tmp_path), "--work", str(tmp_path), "--scale", "small"])
    assert benchmark.main() == 0
    page = capsys.readouterr().out
    assert len(re.findall(r"^\| (?:trained on stories|adapted to sums)", page, re.MULTILINE)) == 3
    assert "Every reply equals that of plain decoding, token for token." in page
    tokenizer = load_tokenizer(str(tmp_path / "models" / "chat-6m"))
    tested = [prompt_ids(tokenizer, asked, True) for asked in list(benchmark.questions(tmp_path, "sums"))[:3]]
    trained_on = [json.loads(line)["prompt_ids"] for line in (tmp_path / "sums.jsonl").read_text().splitlines()]
    assert len(trained_on) == 6
    assert not [ids for ids in tested if ids in trained_on]
