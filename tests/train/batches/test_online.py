"""Training with the target in the loop: the same batches, losses and drafters as from a cache of its states."""

import contextlib
import functools
import gc
import importlib.util
import json
import os
import signal
import subprocess
import sys
import weakref
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from every_family import EVERY_FAMILY, TWO_LAYERS, for_two_layers, loss_settings
from pytorch_lightning.callbacks import ModelCheckpoint
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tiny import TEXTS, save_target
from torch.utils.data import DataLoader
from training import PROMPT, VOCAB, KeepLosses, make_module, make_trainer, tiny_config
from transformers import AutoModel

from draftsmith.data.cache.extract import extract
from draftsmith.data.cache.extraction import StorageOptions
from draftsmith.data.cache.reader import HiddenStateCache
from draftsmith.data.chats.token_kinds import TrainedOn
from draftsmith.models.drafters.rollout import PackedBatch
from draftsmith.models.target.sharding import ShardedOver
from draftsmith.models.target.target import PRE_NORM, Target
from draftsmith.train.batches.cache_subset import CacheBatch
from draftsmith.train.batches.data_module import CacheDataModule
from draftsmith.train.batches.epoch_sampler import EpochSampler
from draftsmith.train.batches.online import OnlineDataModule
from draftsmith.train.batches.target_states import LookAheadLoader, RoundSampler, StatesInTheLoop
from draftsmith.train.batches.token_corpus import TargetFiles, TextSource, write_tokens
from draftsmith.train.drafter.module import DraftModule
from draftsmith.train.drafter_callbacks.keep_best_drafter import KeepBestDrafter
from draftsmith.train.drafter_callbacks.tree_decode_validation import TreeDecodeValidation

SHARDINGS = ["fsdp2", "tp", *(["zero3"] if importlib.util.find_spec("deepspeed") else [])]
# train.py where DeepSpeed, if it is there, works on CPUs and compiles nothing.
ON_CPU = """
import importlib, importlib.util, os, sys
os.environ["DS_ACCELERATOR"] = "cpu"
if importlib.util.find_spec("deepspeed"):
    # The attribute deepspeed.comm.torch is PyTorch itself.
    importlib.import_module("deepspeed.comm.torch").build_shm_op = lambda: None
from draftsmith.cli import main
sys.exit(main(["train", *sys.argv[1:]]))
"""
LENGTHS = [7, 12, 9, 15, 8, 11, 14, 9, 10, 13, 8, 12]
RECIPES: dict[str, dict[str, Any]] = {
    "text": {},
    "path": {"distillation": "path"},
    "local": {"distillation": "local"},
    **{
        family.name: {"drafter": for_two_layers(family, draft_vocab_size=25), **loss_settings(family)}
        for family in EVERY_FAMILY
    },
}


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Replies in token ids, as `data respond` writes them; each token follows from the one before."""
    path = tmp_path_factory.mktemp("source") / "replies.jsonl"
    starts = torch.randint(0, VOCAB, (len(LENGTHS),), generator=torch.Generator().manual_seed(0)).tolist()
    with path.open("w") as file:
        for number, (start, length) in enumerate(zip(starts, LENGTHS, strict=True)):
            ids = [2 + (start + place) % (VOCAB - 2) for place in range(length)]
            row = {"id": f"s{number}", "prompt_ids": ids[:PROMPT], "reply_ids": ids[PROMPT:], "finish": "length"}
            file.write(json.dumps(row) + "\n")
    return path


def cached(target_dir: Path, source: Path, folder: Path, dtype: Any = "float32") -> Path:
    """The cache that `data extract` makes of the same text, with all that any recipe reads."""
    extract(str(target_dir), source, folder, storage=StorageOptions(layers=TWO_LAYERS, dtype=dtype, local_horizon=4))
    return folder


def online(source: Path, root: Path, **settings: Any) -> OnlineDataModule:
    return OnlineDataModule(source, root / "tokens", **({"tokens_per_batch": 40, "forward_tokens": 24} | settings))


def fit(
    root: Path, target_dir: Path, data: pl.LightningDataModule, settings: dict[str, Any]
) -> tuple[list[float], dict[str, torch.Tensor]]:
    losses: list[float] = []
    module = make_module(target_dir, **settings)
    make_trainer(root, max_epochs=2, callbacks=[KeepLosses(losses)]).fit(module, data)
    return losses, weights_of(module)


def weights_of(module: DraftModule) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in module.state_dict().items()}


@pytest.mark.parametrize(
    ("option", "value"), [("target_sharding", "fsdp2"), ("target_device_map", "auto"), ("target_quantization", "8bit")]
)
def test_riders_do_not_learn_through_a_target_that_is_not_whole(
    source: Path, tmp_path: Path, option: str, value: str
) -> None:
    online(source, tmp_path).check_whole("RiderDrafter")
    with pytest.raises(
        ValueError, match=f"{option} is '{value}', and a RiderDrafter learns through the target's own blocks"
    ):
        online(source, tmp_path, **{option: value}).check_whole("RiderDrafter")


@pytest.mark.parametrize("recipe", RECIPES)
def test_online_training_takes_the_steps_of_training_from_a_cache(
    target_dir: Path, source: Path, tmp_path: Path, recipe: str
) -> None:
    cache = cached(target_dir, source, tmp_path / "cache")
    offline, expected = fit(tmp_path, target_dir, CacheDataModule(cache, tokens_per_batch=40), RECIPES[recipe])
    losses, got = fit(tmp_path, target_dir, online(source, tmp_path), RECIPES[recipe])
    assert len(offline) == 6
    assert losses == pytest.approx(offline, rel=1e-5)
    assert got.keys() == expected.keys(), "the target is part of the module"
    for name, value in expected.items():
        torch.testing.assert_close(got[name], value, atol=1e-5, rtol=1e-4, msg=name)


def test_a_bf16_cache_differs_from_online_training_by_its_rounding(
    target_dir: Path, source: Path, tmp_path: Path
) -> None:
    cache = cached(target_dir, source, tmp_path / "cache", "bfloat16")
    rounded, _ = fit(tmp_path, target_dir, CacheDataModule(cache, tokens_per_batch=40), RECIPES["path"])
    losses, _ = fit(tmp_path, target_dir, online(source, tmp_path), RECIPES["path"])
    # A bfloat16 has 8 bits of precision, so a state is off by up to 2^-9 of itself.
    assert losses == pytest.approx(rounded, rel=2**-5)
    assert losses != pytest.approx(rounded, rel=1e-5)


@pytest.mark.parametrize("recipe", ["local", "eagle3"])
def test_a_bf16_target_lends_its_ends_and_teaches_what_a_float32_one_does(
    target_dir: Path, source: Path, tmp_path: Path, recipe: str
) -> None:
    expected, _ = fit(tmp_path, target_dir, online(source, tmp_path), RECIPES[recipe])
    losses: list[float] = []
    data = online(source, tmp_path, target_dtype="bfloat16")
    module = make_module(target_dir, **RECIPES[recipe], ends_dtype="bfloat16")
    make_trainer(tmp_path, max_epochs=2, precision="bf16-mixed", callbacks=[KeepLosses(losses)]).fit(module, data)
    assert module.ends is data.target.ends
    assert next(iter(data.val_dataloader())).packed.hidden[PRE_NORM].dtype == torch.bfloat16
    assert losses == pytest.approx(expected, rel=2**-4)
    assert losses != pytest.approx(expected, rel=1e-5)


class SaveEveryStep(ModelCheckpoint):
    """Keeps every step's checkpoint as step=N.ckpt."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder, filename="{step}", save_top_k=-1, every_n_train_steps=1)


@pytest.mark.parametrize("resume_at", [2, 4])
def test_a_resumed_run_ends_with_the_very_weights_of_an_uninterrupted_one(
    target_dir: Path, source: Path, tmp_path: Path, resume_at: int
) -> None:
    def run(checkpoint: Path | None, callbacks: list[pl.Callback], ahead: bool) -> DraftModule:
        module = make_module(target_dir, distillation="local", ema_decay=0.9)
        trainer = make_trainer(tmp_path, max_epochs=2, enable_checkpointing=True, callbacks=callbacks)
        trainer.fit(module, online(source, tmp_path, look_ahead=ahead), ckpt_path=checkpoint)
        assert trainer.global_step == 6
        return module

    # At one of the two steps the interrupted run had computed a batch that it did not train on.
    whole = run(None, [SaveEveryStep(tmp_path / "steps")], ahead=resume_at == 2)
    resumed = run(tmp_path / "steps" / f"step={resume_at}.ckpt", [], ahead=resume_at != 2)
    expected = weights_of(whole), whole.evaluated.state_dict()
    for own, others in zip(expected, (weights_of(resumed), resumed.evaluated.state_dict()), strict=True):
        assert own.keys() == others.keys()
        assert all(torch.equal(value, others[name]) for name, value in own.items())
    saved = torch.load(tmp_path / "steps" / "step=6.ckpt", weights_only=True)
    assert {name.partition(".")[0] for name in saved["state_dict"]} == {"drafter", "average"}, "the target is saved too"


def test_validation_decodes_with_the_target_in_memory_and_the_best_drafter_loads_back(
    target_dir: Path, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loads: list[str] = []
    load = Target.load.__func__  # type: ignore[attr-defined]
    monkeypatch.setattr(
        Target, "load", classmethod(lambda cls, *args, **kwargs: loads.append(args[0]) or load(cls, *args, **kwargs))
    )
    module = make_module(target_dir)
    callbacks = [TreeDecodeValidation(2, 8), KeepBestDrafter(tmp_path / "drafter")]
    trainer = make_trainer(tmp_path, callbacks=callbacks)
    trainer.fit(module, online(source, tmp_path, val_fraction=0.2))
    assert loads == [str(target_dir)]
    assert trainer.callback_metrics["val/tokens_per_step"] >= 1.0
    own = module.evaluated.state_dict()
    again = AutoModel.from_pretrained(tmp_path / "drafter").state_dict()
    assert all(torch.equal(value, own[name]) for name, value in again.items())
    record = json.loads((tmp_path / "drafter" / "provenance.json").read_text())
    assert str(tmp_path / "tokens" / "train") in json.dumps(record)


def test_validation_text_of_its_own_is_read(target_dir: Path, source: Path, tmp_path: Path) -> None:
    data = online(source, tmp_path, val_source=source)
    make_trainer(tmp_path, max_steps=1).fit(make_module(target_dir), data)
    assert data.train_set is not None
    assert data.val_set is not None
    assert (len(data.train_set), len(data.val_set)) == (len(LENGTHS), len(LENGTHS))
    assert set(next(iter(data.val_dataloader())).packed.hidden) == {PRE_NORM}


def test_tokens_are_written_once_and_other_text_is_refused(target_dir: Path, source: Path, tmp_path: Path) -> None:
    def run(text: Path) -> None:
        make_trainer(tmp_path, max_steps=1).fit(make_module(target_dir), online(text, tmp_path))

    run(source)
    written = {path: path.stat().st_mtime_ns for path in (tmp_path / "tokens" / "train").iterdir()}
    run(source)
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "tokens" / "train").iterdir()} == written
    other = tmp_path / "other.jsonl"
    other.write_text(source.read_text().splitlines()[0] + "\n")
    with pytest.raises(ValueError, match="holds the tokens of other text"):
        run(other)


def test_any_source_of_extract_becomes_the_same_samples(tmp_path: Path) -> None:
    target_dir = save_target(tmp_path / "target")
    text = tmp_path / "text.jsonl"
    talk = [{"role": "user", "content": TEXTS[1]}, {"role": "assistant", "content": TEXTS[2]}]
    rows = [
        {"id": "talk", "messages": talk},
        {"id": "document", "text": TEXTS[0] * 3},
        {"id": "question", "messages": talk[:1]},
        {"id": "reply", "prompt_ids": [7, 8, 9], "reply_ids": [10, 11, 4], "finish": "eos"},
    ]
    text.write_text("".join(json.dumps(row) + "\n" for row in rows))
    extract(str(target_dir), text, tmp_path / "cache", storage=StorageOptions(max_length=40))
    write_tokens(tmp_path / "tokens", TextSource(text, max_length=40), TargetFiles(str(target_dir)))
    cache, tokens = HiddenStateCache(tmp_path / "cache"), HiddenStateCache(tmp_path / "tokens")
    for name in ("num_samples", "num_tokens", "num_labelled", "num_dropped", "num_cut"):
        assert getattr(tokens.manifest, name) == getattr(cache.manifest, name), name
    assert (tokens.manifest.num_dropped, tokens.manifest.num_cut) == (1, 1)
    assert tokens.manifest.identity.mask == cache.manifest.identity.mask
    for own, expected in zip(tokens, cache, strict=True):
        assert (own.id, own.input_ids.tolist(), own.loss_mask.tolist()) == (
            expected.id,
            expected.input_ids.tolist(),
            expected.loss_mask.tolist(),
        )
        assert not own.hidden


def test_what_is_trained_on_is_chosen_as_in_extraction(tmp_path: Path) -> None:
    target_dir, text = save_target(tmp_path / "target"), tmp_path / "text.jsonl"
    question, answer = ({"role": role, "content": TEXTS[2]} for role in ("user", "assistant"))
    text.write_text(json.dumps({"id": "talk", "messages": [question, answer, question, answer]}) + "\n")
    last = TrainedOn(last_turn_only=True)
    extract(str(target_dir), text, tmp_path / "cache", storage=StorageOptions(max_length=200), trained_on=last)
    data = OnlineDataModule(text, tmp_path / "tokens", max_length=200, last_turn_only=True)
    [asked] = data.texts.values()
    write_tokens(tmp_path / "tokens", asked, TargetFiles(str(target_dir)))
    [own], [expected] = HiddenStateCache(tmp_path / "tokens"), HiddenStateCache(tmp_path / "cache")
    assert own.loss_mask.tolist() == expected.loss_mask.tolist()
    assert 0 < own.loss_mask.sum() < len(own.loss_mask) // 2
    with pytest.raises(ValueError, match="trained_on"):
        write_tokens(tmp_path / "tokens", replace(asked, trained_on=TrainedOn()), TargetFiles(str(target_dir)))
    with pytest.raises(ValueError, match="nothing is trained on"):
        OnlineDataModule(text, tmp_path / "none", train_replies=False, train_tool_calls=False, train_thoughts=False)


def test_text_without_anything_to_train_on_is_refused(target_dir: Path, tmp_path: Path) -> None:
    text = tmp_path / "replies.jsonl"
    text.write_text(json.dumps({"prompt_ids": [3, 4], "reply_ids": [], "finish": "eos"}) + "\n")
    with pytest.raises(ValueError, match="no token of the data set is trained on"):
        write_tokens(tmp_path / "tokens", TextSource(text, template="none"), TargetFiles(str(target_dir)))
    assert not (tmp_path / "tokens").exists()


def test_ids_that_the_target_lacks_are_refused(target_dir: Path, tmp_path: Path) -> None:
    text = tmp_path / "replies.jsonl"
    text.write_text(json.dumps({"prompt_ids": [3], "reply_ids": [VOCAB], "finish": "eos"}) + "\n")
    with pytest.raises(ValueError, match=f"has the token id {VOCAB}"):
        make_trainer(tmp_path).fit(make_module(target_dir), online(text, tmp_path))
    assert not (tmp_path / "tokens" / "train").exists()


@pytest.mark.parametrize(
    ("settings", "complaint"),
    [
        ({"forward_tokens": 0}, "at least 1 token"),
        ({"target_sharding": "tp", "target_device_map": "auto"}, "drop target_device_map"),
        ({"target_sharding": "fsdp2", "look_ahead": True}, "leave it null"),
        ({"val_split": "val"}, "would use the validation samples"),
        ({"target_sharding": "rings"}, "use one of none, fsdp2, tp, zero3"),
        ({"target_sharding": "fsdp2"}, "start several"),
        ({"max_length": 4096}, "has a context of"),
    ],
)
def test_settings_that_do_not_work_are_refused(
    target_dir: Path, source: Path, tmp_path: Path, settings: dict[str, Any], complaint: str
) -> None:
    with pytest.raises(ValueError, match=complaint):
        make_trainer(tmp_path).fit(make_module(target_dir), online(source, tmp_path, **settings))


def test_a_run_without_a_target_is_refused(source: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="takes its target from the module"):
        online(source, tmp_path).prepare_data()


def batch_of(texts: Sequence[Sequence[int]]) -> CacheBatch:
    lengths = torch.tensor([len(ids) for ids in texts])
    packed = PackedBatch(
        input_ids=torch.tensor([token for ids in texts for token in ids]),
        loss_mask=torch.ones(int(lengths.sum()), dtype=torch.bool),
        document_ids=torch.repeat_interleave(torch.arange(len(texts)), lengths),
        positions=torch.cat([torch.arange(int(length)) for length in lengths]),
        hidden={},
    )
    return CacheBatch(packed, tuple(f"t{number}" for number in range(len(texts))))


BATCHES = [[[3, 4, 5], [6, 7], [8, 9, 10, 11, 12]], [[13, 14]], [[15], [16, 17, 18, 19], [20, 21]]]


def in_the_loop(target: Target, over: ShardedOver) -> StatesInTheLoop:
    return StatesInTheLoop(target, over, TWO_LAYERS, 2, forward_tokens=5, device=torch.device("cpu"))


@pytest.mark.parametrize("sharding", ["none", "fsdp2", "tp"])
def test_states_are_those_of_each_text_alone_whoever_holds_the_target(target: Target, sharding: Any) -> None:
    for rank, texts in enumerate(BATCHES):
        over = ShardedOver(sharding, rank, 1 if sharding == "none" else len(BATCHES))
        batches = [batch_of(texts)] if sharding == "none" else [batch_of(others) for others in BATCHES]
        batch = in_the_loop(target, over)(batches)
        for name, states_TD in batch.packed.hidden.items():
            alone = [target.prefix(torch.tensor([ids]), TWO_LAYERS).feature(name)[0] for ids in texts]
            torch.testing.assert_close(states_TD, torch.cat(alone), atol=1e-5, rtol=1e-5)
            assert not states_TD.is_inference()
        assert batch.packed.greedy_ids is not None
        assert batch.packed.greedy_ids.shape == (sum(map(len, texts)), 2)


@pytest.mark.parametrize("sharding", ["fsdp2", "tp", "zero3"])
def test_processes_that_hold_a_target_together_run_equally_many_forwards(
    target: Target, monkeypatch: pytest.MonkeyPatch, sharding: Any
) -> None:
    forwards: list[list[tuple[int, ...]]] = []
    prefix = Target.prefix

    def counted(self: Target, input_ids: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        forwards[-1].append(tuple(input_ids.shape))
        return prefix(self, input_ids, *args, **kwargs)

    monkeypatch.setattr(Target, "prefix", counted)
    for rank in range(len(BATCHES)):
        forwards.append([])
        in_the_loop(target, ShardedOver(sharding, rank, len(BATCHES)))([batch_of(texts) for texts in BATCHES])
    assert len({len(shapes) for shapes in forwards}) == 1
    # Those of one share run the very same ones; others fill up with forwards of one token.
    assert (len({tuple(shapes) for shapes in forwards}) == 1) == (sharding == "tp")
    assert ((1, 1) in forwards[1]) == (sharding != "tp")


def test_members_of_a_group_know_the_batches_of_each_other_and_of_nobody_else() -> None:
    def sampler(rank: int, start: int = 0) -> EpochSampler:
        return EpochSampler(LENGTHS, 12, seed=3, shuffle=True, rank=rank, world_size=4, start=start)

    own = [list(sampler(rank)) for rank in range(4)]
    rounds = RoundSampler(sampler(2), range(2, 4))
    assert list(rounds) == [list(batches) for batches in zip(own[2], own[3], strict=True)]
    assert len(rounds) == len(own[2])
    assert list(RoundSampler(sampler(2), None)) == [[batch] for batch in own[2]]
    assert list(RoundSampler(sampler(3, start=1), range(4))) == [list(b) for b in zip(*own, strict=True)][1:]
    rounds.set_epoch(1)
    assert list(rounds) != [list(batches) for batches in zip(own[2], own[3], strict=True)]


class Numbered:
    """Stands for the target: gives batches with states, and knows how many of them are still alive."""

    def __init__(self) -> None:
        self.asked: list[str] = []
        self.alive = 0
        self.most = 0

    def __call__(self, batches: Sequence[CacheBatch]) -> CacheBatch:
        self.alive += 1
        self.most = max(self.most, self.alive)
        self.asked.append(batches[0].sample_ids[0])
        made = CacheBatch(batches[0].packed, batches[0].sample_ids)
        weakref.finalize(made, self._gone)
        return made

    def _gone(self) -> None:
        self.alive -= 1


def numbered_rounds(count: int) -> DataLoader:
    rounds = []
    for number in range(count):
        batch = batch_of([[number]])
        batch.sample_ids = (str(number),)
        rounds.append([batch])
    return DataLoader(rounds, batch_size=None)  # type: ignore[arg-type]


def test_running_ahead_changes_when_states_are_computed_and_nothing_else() -> None:
    seen: dict[bool, list[tuple[str, int]]] = {}
    for ahead in (False, True):
        states = Numbered()
        batches = iter(LookAheadLoader(numbered_rounds(4), states, ahead, torch.device("cpu")))
        seen[ahead] = [(batch.sample_ids[0], len(states.asked)) for batch in batches]
    assert seen[False] == [("0", 1), ("1", 2), ("2", 3), ("3", 4)]
    assert seen[True] == [("0", 2), ("1", 3), ("2", 4), ("3", 4)]


def test_no_more_than_two_batches_have_states_at_any_time() -> None:
    for ahead, most in ((False, 1), (True, 2)):
        states = Numbered()

        def steps(batches: Iterator[CacheBatch]) -> None:
            while next(batches, None) is not None:
                pass

        steps(iter(LookAheadLoader(numbered_rounds(5), states, ahead, torch.device("cpu"))))
        gc.collect()
        assert (states.most, states.alive) == (most, 0)


@pytest.mark.parametrize(("ahead", "most"), [(False, 1), (True, 2)])
def test_a_run_never_holds_the_states_of_more_than_two_batches(
    target_dir: Path, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ahead: bool, most: int
) -> None:
    alive: set[int] = set()
    counts: list[int] = []
    compute = StatesInTheLoop.__call__

    def counted(self: StatesInTheLoop, batches: Sequence[CacheBatch]) -> CacheBatch:
        batch = compute(self, batches)
        states = batch.packed.hidden[PRE_NORM]
        alive.add(id(states))
        weakref.finalize(states, alive.discard, id(states))
        counts.append(len(alive))
        return batch

    monkeypatch.setattr(StatesInTheLoop, "__call__", counted)
    module = make_module(target_dir, distillation="path")
    trainer = make_trainer(tmp_path, max_epochs=2, val_check_interval=2)
    trainer.fit(module, online(source, tmp_path, val_fraction=0.4, tokens_per_batch=20, look_ahead=ahead))
    assert len(counts) >= 8
    assert max(counts) == most


def test_a_target_placed_by_accelerate_gives_its_states_to_the_modules_device(
    target_dir: Path, source: Path, tmp_path: Path
) -> None:
    expected, _ = fit(tmp_path, target_dir, online(source, tmp_path), RECIPES["eagle3"])
    losses, _ = fit(tmp_path, target_dir, online(source, tmp_path, target_device_map="auto"), RECIPES["eagle3"])
    assert losses == pytest.approx(expected, rel=1e-6)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.gpu
def test_a_stream_of_its_own_gives_the_batches_of_the_plain_loop(
    target_dir: Path, source: Path, tmp_path: Path
) -> None:
    results = {}
    for ahead in (False, True):
        losses: list[float] = []
        module = make_module(target_dir, distillation="local")
        trainer = make_trainer(tmp_path, accelerator="gpu", max_epochs=4, callbacks=[KeepLosses(losses)])
        trainer.fit(module, online(source, tmp_path, look_ahead=ahead))
        results[ahead] = losses
    assert results[True] == pytest.approx(results[False], rel=1e-5)


def online_config(folder: Path, target_dir: Path, source: Path) -> Path:
    """A YAML of an online run over in seconds, with a checkpoint of every step, and beams so wide that drafts are accepted."""
    folder.mkdir()
    path = tiny_config(folder, target_dir, folder, "    distillation: local")
    head, _, _ = path.read_text().partition("\ndata:\n")
    head = head.replace("save_top_k: 0", "save_top_k: -1, filename: '{step}'")
    head = head.replace("max_new_tokens: 8", "max_new_tokens: 40, beam_width: 32")
    data = {
        "class_path": "draftsmith.train.OnlineDataModule",
        "init_args": {
            "source": str(source),
            "tokens": str(folder / "tokens"),
            "val_fraction": 0.2,
            "tokens_per_batch": 40,
            "forward_tokens": 24,
        },
    }
    path.write_text(f"{head}\ndata: {json.dumps(data)}\n")
    return path


def train(config: Path, *arguments: str) -> None:
    script = config.parent / "train_on_cpu.py"
    script.write_text(ON_CPU)
    process = subprocess.Popen(
        [sys.executable, str(script), "fit", f"--config={config}", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        output, _ = process.communicate(timeout=400)
    finally:
        # With those that Lightning started for it.
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    assert process.returncode == 0, output[-4000:]


def over_two(sharding: str) -> list[str]:
    return [
        "--trainer.devices=2",
        "--trainer.strategy=ddp",
        "--data.init_args.tokens_per_batch=20",
        f"--data.init_args.target_sharding={sharding}",
    ]


def scalars(run: Path, name: str) -> list[float]:
    events = EventAccumulator(str(run))
    events.Reload()
    return [event.value for event in events.Scalars(name)]


@pytest.fixture(scope="module")
def runs(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """runs("one"): the folder of a run of one process; runs(sharding): of two. Each is made once."""
    root = tmp_path_factory.mktemp("runs")
    target_dir = save_target(root / "target")

    @functools.cache
    def run(name: str) -> Path:
        train(online_config(root / name, target_dir, source), *([] if name == "one" else over_two(name)))
        return root / name / "run"

    return run


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("sharding", SHARDINGS)
def test_two_processes_that_share_the_target_train_as_one_does(runs: Callable[[str], Path], sharding: str) -> None:
    names = ("train/loss", "train/step0/top1", "val/loss", "val/tokens_per_step", "val/accept_depth1")
    for scalar in names:
        alone, together = (scalars(runs(name), scalar) for name in ("one", sharding))
        assert len(alone) >= 2
        assert together == pytest.approx(alone, rel=1e-4), scalar
    assert min(scalars(runs(sharding), "val/accept_depth1")) > 0, "no draft was accepted, which proves little"
    expected, got = (load_file(runs(name) / "drafter/model.safetensors") for name in ("one", sharding))
    for weight, value in expected.items():
        torch.testing.assert_close(got[weight], value, atol=1e-4, rtol=1e-3, msg=weight)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_a_run_over_a_sharded_target_goes_on_in_the_middle_of_an_epoch_to_the_same_weights(
    runs: Callable[[str], Path], source: Path, tmp_path: Path
) -> None:
    interrupted = runs("fsdp2") / "checkpoints"
    config = online_config(tmp_path / "resumed", interrupted.parents[2] / "target", source)
    train(config, *over_two("fsdp2"), f"--ckpt_path={interrupted / 'step=2.ckpt'}")
    whole, resumed = (
        torch.load(folder / "step=6.ckpt", weights_only=True)["state_dict"]
        for folder in (interrupted, tmp_path / "resumed/run/checkpoints")
    )
    assert not (tmp_path / "resumed/run/checkpoints/step=2.ckpt").exists()
    assert {name.partition(".")[0] for name in whole} == {"drafter"}, "the target is saved too"
    assert whole.keys() == resumed.keys()
    assert all(torch.equal(value, resumed[name]) for name, value in whole.items())
