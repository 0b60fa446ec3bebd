"""Every engine trains as one process does, and leaves the same drafter and the same checkpoints.

On the CPU with gloo and two processes; DeepSpeed with its CPU accelerator. Starting processes costs more than what they do, so all
runs share one launch, but for those that resume after a kill.
"""

import itertools
import json
import signal
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from engine_jobs import Job, launch, run
from every_family import EVERY_FAMILY, TWO_LAYERS, loss_settings, name_of
from pytorch_lightning.accelerators import CPUAccelerator, CUDAAccelerator
from pytorch_lightning.strategies import DDPStrategy, ModelParallelStrategy
from safetensors.torch import load_file
from training import MakeCache, make_module, make_trainer

from draftsmith.train.batches.data_module import CacheDataModule
from draftsmith.train.draft_lm.module import DraftLMModule
from draftsmith.train.drafter_callbacks.keep_best_drafter import KeepBestDrafter
from draftsmith.train.drafter_callbacks.throughput import Throughput
from draftsmith.train.judge.module import JudgeModule
from draftsmith.train.run.averaging import AVERAGE, AveragingAdamW
from draftsmith.train.run.strategies import FullyShard, Zero, refuse_other_engines

if find_spec("deepspeed") is None:
    pytest.skip("needs DeepSpeed: pip install 'draftsmith[deepspeed]'", allow_module_level=True)

EAGLE = {"distillation": "path", "feature_weight": 1.0, "logit_weight": 0.1, "num_steps": 2}
# The other families than that of most jobs.
FURTHER = [family for family in EVERY_FAMILY if family.name != Job.family]
ENGINES = ("ddp", "fsdp2", "zero2", "zero3")
KILLED = ("fsdp2", "zero3")


@dataclass(frozen=True)
class Ended:
    """What a killed run left: exit codes of its processes, names of its checkpoints."""

    codes: list[int]
    checkpoints: list[str]


@dataclass
class Runs:
    """Runs by name, those of one process among them; the killed ones have resumed."""

    folder: Path
    log: str = ""
    ended: dict[str, Ended] = field(default_factory=dict)

    def launch(self, jobs: Sequence[Job]) -> list[int]:
        codes = launch(jobs, self.folder)
        self.log += "\n".join((self.folder / f"log{rank}.txt").read_text()[-2500:] for rank in (0, 1))
        return codes

    def record(self, name: str, rank: int = 0) -> dict[str, Any]:
        path = self.folder / name / f"record{rank}.json"
        assert path.is_file(), f"{name} did not finish:\n{self.log}"
        return json.loads(path.read_text())

    def drafter(self, name: str) -> dict[str, torch.Tensor]:
        assert (self.folder / name / "drafter").is_dir(), f"{name} left no drafter:\n{self.log}"
        [weights] = (self.folder / name / "drafter").glob("*.safetensors")
        return load_file(weights)

    def checkpoint(self, name: str, step: int) -> dict[str, Any]:
        return torch.load(self.folder / name / "checkpoints" / f"step={step}.ckpt", weights_only=True)


def plan(folder: Path, target: Path, cache: Path) -> tuple[list[Job], list[Job]]:
    """The runs of one process, and those of two."""

    def job(name: str, engine: str, **more: Any) -> Job:
        return Job(engine, str(folder / name), str(target), str(cache), **more)

    recipes: dict[str, dict[str, Any]] = {
        "redrafter": {"settings": {"weight_decay": 0.1}},
        "frozen": {"family_settings": {"freeze_head": True, "draft_vocab_size": 20}, "settings": {"ema_decay": None}},
        # Seven divides by no number of processes: shares differ in size.
        "odd": {"family_settings": {"exit_dim": 7, "head_init": "random"}},
        **{
            family.name: {"family": family.name, "settings": loss_settings(family) | {"skip_outside": True}}
            for family in FURTHER
        },
        "lora": {"adapt": str(folder / "redrafter one" / "drafter")},
        "bf16": {"trainer": {"precision": "bf16-mixed"}},
        "accumulated": {"trainer": {"accumulate_grad_batches": 3}},
    }
    engines = {"redrafter": ENGINES, "accumulated": ENGINES}
    one = [job(f"{name} one", "one", **recipe) for name, recipe in recipes.items()]
    two = [
        job(f"{name} {engine}", engine, **recipe)
        for name, recipe in recipes.items()
        for engine in engines.get(name, ("fsdp2", "zero3"))
    ]
    noisy: dict[str, Any] = {
        "family": "eagle",
        "settings": EAGLE,
        "family_settings": {"feature_noise": 0.1, "draft_vocab_size": 19},
    }
    for engine in ("fsdp2", "zero2", "zero3"):
        whole = job(f"noisy {engine}", engine, **noisy)
        saved = f"{whole.folder}/checkpoints/step=2.ckpt"
        two += [whole, replace(whole, folder=f"{whole.folder} resumed", resume=saved)]
    for engine in ("fsdp2", "zero3"):
        saved = str(folder / f"odd {engine}" / "checkpoints" / "step=2.ckpt")
        two.append(job(f"odd {engine} resumed", engine, **recipes["odd"], resume=saved))
    for engine in ("fsdp2", "zero3", "ddp"):
        saved = str(folder / f"redrafter {'zero2' if engine == 'ddp' else 'ddp'}" / "checkpoints" / "step=2.ckpt")
        two.append(job(f"moved {engine}", engine, **recipes["redrafter"], resume=saved))
    saved = str(folder / "redrafter one" / "checkpoints" / "step=4.ckpt")
    one.append(job("validated one", "one", verb="validate", resume=saved))
    two += [job(f"validated {engine}", engine, verb="validate", resume=saved) for engine in ("fsdp2", "zero2", "zero3")]
    for engine in ("fsdp2", "zero3"):
        two.append(
            job(f"refused {engine}", engine, trainer={"precision": "bf16-true"}, expect="weights stay in float32")
        )
        two.append(job(f"infinite {engine}", engine, settings={"lr": 1e30, "warmup_ratio": 0.0}, expect="lower lr"))
    return one, two


@pytest.fixture(scope="module")
def cache(make_cache: MakeCache) -> Path:
    return make_cache([7, 12, 9, 15, 8, 11, 14, 9, 10, 13, 8, 12], layers=TWO_LAYERS)


@pytest.fixture(scope="module")
def runs(target_dir: Path, cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Runs:
    folder = tmp_path_factory.mktemp("engines")
    one, jobs = plan(folder, target_dir, cache)
    for job in one:
        Path(job.folder).mkdir()
        run(job, 1)
    found = Runs(folder)
    for engine in KILLED:
        # A launch ends with the run that kills its processes; the next one begins where that run was.
        killed = Job(
            engine,
            str(folder / f"killed {engine}"),
            str(target_dir),
            str(cache),
            settings={"weight_decay": 0.1},
            die_before=4,
        )
        codes = found.launch([*jobs, killed])
        left = Path(killed.folder) / "checkpoints"
        found.ended[engine] = Ended(codes, sorted(path.name for path in left.glob("*")))
        jobs = [replace(killed, die_before=None, resume=str(left / "step=4.ckpt"))]
    found.launch(jobs)
    return found


def assert_close(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], atol: float = 1e-6) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, atol=atol, rtol=1e-5, msg=name)


def metrics(record: dict[str, Any]) -> dict[str, float]:
    return {name: value for name, value in record["metrics"].items() if "held" not in name}


SAME = [
    *[f"redrafter {engine}" for engine in ENGINES],
    *[
        f"{name} {engine}"
        for name in ("frozen", "odd", "lora", *map(name_of, FURTHER))
        for engine in ("fsdp2", "zero3")
    ],
    *[f"accumulated {engine}" for engine in ENGINES],
]


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("name", SAME)
def test_two_processes_train_as_one_does_on_the_joint_batch_and_leave_its_drafter(runs: Runs, name: str) -> None:
    recipe = name.split()[0]
    alone, together = runs.record(f"{recipe} one"), runs.record(name)
    assert len(alone["losses"]) >= 6
    assert together["losses"] == pytest.approx(alone["losses"], rel=1e-4)
    assert len(metrics(alone)) > 8
    assert metrics(together) == pytest.approx(metrics(alone), rel=1e-4)
    assert_close(runs.drafter(name), runs.drafter(f"{recipe} one"))


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_training_moves_the_weights_that_are_compared(runs: Runs) -> None:
    first, last = (runs.checkpoint("redrafter one", step)["state_dict"] for step in (1, 6))
    moved = [(last[name] - first[name]).abs().max() for name in first if name.startswith("drafter.")]
    assert max(moved) > 1e-3
    average = torch.cat([(last[name] - last[f"average.{name[8:]}"]).flatten() for name in last if "drafter." in name])
    assert average.abs().max() > 1e-4


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("engine", ENGINES)
def test_a_checkpoint_is_the_file_that_one_process_writes(runs: Runs, engine: str) -> None:
    expected, found = (runs.checkpoint(f"redrafter {name}", 4) for name in ("one", engine))
    assert_close(found["state_dict"], expected["state_dict"])
    assert found["score_scale"] == expected["score_scale"]
    [optimizer], [reference] = found["optimizer_states"], expected["optimizer_states"]
    assert optimizer["param_groups"] == reference["param_groups"]
    assert optimizer["state"].keys() == reference["state"].keys()
    for number, state in reference["state"].items():
        assert_close(optimizer["state"][number], state)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_each_process_holds_its_share(runs: Runs) -> None:
    all_weights = runs.record("redrafter ddp")["metrics"]["weights held"]
    for engine, weights, states in (("ddp", 1, 1), ("fsdp2", 0.5, 0.5), ("zero2", 1, 0.5), ("zero3", 0.5, 0.5)):
        for rank in (0, 1):
            found = runs.record(f"redrafter {engine}", rank)["metrics"]
            assert found["weights held"] == pytest.approx(weights * all_weights, rel=0.05), engine
            assert found["states held"] == pytest.approx(states * all_weights, rel=0.05), engine


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("engine", ["fsdp2", "zero3"])
def test_bf16_multiplies_in_bf16_and_keeps_float32_weights(runs: Runs, engine: str) -> None:
    exact, alone, together = (runs.record(name) for name in ("redrafter one", "bf16 one", f"bf16 {engine}"))
    assert together["losses"] == pytest.approx(alone["losses"], rel=0.01)
    assert together["losses"] != pytest.approx(exact["losses"], rel=1e-5)
    checkpoint = runs.checkpoint(f"bf16 {engine}", 4)
    assert all(value.dtype == torch.float32 for value in checkpoint["state_dict"].values())
    for state in checkpoint["optimizer_states"][0]["state"].values():
        assert all(value.dtype == torch.float32 for value in state.values())


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("name", ["noisy fsdp2", "noisy zero2", "noisy zero3", "odd fsdp2", "odd zero3"])
def test_a_run_resumed_in_the_middle_of_an_epoch_ends_with_the_very_weights(runs: Runs, name: str) -> None:
    assert runs.record(f"{name} resumed")["losses"] == runs.record(name)["losses"][2:]
    whole, resumed = runs.checkpoint(name, 6), runs.checkpoint(f"{name} resumed", 6)
    for key, value in whole["state_dict"].items():
        assert torch.equal(value, resumed["state_dict"][key]), key
    for number, state in whole["optimizer_states"][0]["state"].items():
        for key, value in state.items():
            assert torch.equal(value, resumed["optimizer_states"][0]["state"][number][key]), key
    assert whole["lr_schedulers"] == resumed["lr_schedulers"]
    best, kept = runs.drafter(name), runs.drafter(f"{name} resumed")
    assert all(torch.equal(value, kept[key]) for key, value in best.items())


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("engine", ["fsdp2", "zero3", "ddp"])
def test_a_run_goes_on_under_another_engine(runs: Runs, engine: str) -> None:
    alone, moved = runs.record("redrafter one"), runs.record(f"moved {engine}")
    assert moved["losses"] == pytest.approx(alone["losses"][2:], rel=1e-4)
    assert_close(runs.drafter(f"moved {engine}"), runs.drafter("redrafter one"))


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("engine", ["fsdp2", "zero2", "zero3"])
def test_a_checkpoint_of_one_process_is_validated_as_it_validates_itself(runs: Runs, engine: str) -> None:
    alone = metrics(runs.record("validated one"))
    assert alone["val/loss"] > 0
    assert metrics(runs.record(f"validated {engine}")) == pytest.approx(alone, rel=1e-4)


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("engine", ["fsdp2", "zero3"])
@pytest.mark.parametrize("why", ["refused", "infinite"])
def test_every_process_refuses_in_words(runs: Runs, engine: str, why: str) -> None:
    for rank in (0, 1):
        assert runs.record(f"{why} {engine}", rank)["metrics"]["refused"] == 1.0


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("engine", KILLED)
def test_a_run_that_is_killed_goes_on_to_the_same_drafter(runs: Runs, engine: str) -> None:
    ended = runs.ended[engine]
    assert ended.codes == [-signal.SIGKILL] * 2, runs.log
    assert ended.checkpoints == [f"step={step}.ckpt" for step in (1, 2, 3, 4)]
    expected, found = (runs.checkpoint(f"{name} {engine}", 6) for name in ("redrafter", "killed"))
    for name, value in expected["state_dict"].items():
        assert torch.equal(value, found["state_dict"][name]), name


def test_the_average_follows_the_weights_from_where_they_began() -> None:
    weight = torch.nn.Parameter(torch.tensor([1.0, -2.0]))
    optimizer = AveragingAdamW([{"params": [weight]}], lr=0.1, betas=(0.9, 0.98), decay=0.75)
    expected = weight.detach().clone()
    for _ in range(3):
        weight.grad = 2 * weight.detach()
        optimizer.step()
        expected = 0.75 * expected + 0.25 * weight.detach()
    torch.testing.assert_close(optimizer.state[weight][AVERAGE], expected)
    assert not torch.equal(expected, weight.detach())


def test_the_average_goes_on_where_a_saved_one_was() -> None:
    weights = [torch.nn.Parameter(torch.tensor([1.0, -2.0])) for _ in range(2)]
    first, second = (AveragingAdamW([{"params": [weight]}], 0.1, (0.9, 0.98), 0.75) for weight in weights)
    for _ in range(2):
        weights[0].grad = weights[0].detach() * 2
        first.step()
    second.load_state_dict(first.state_dict())
    assert torch.equal(second.state[weights[1]][AVERAGE], first.state[weights[0]][AVERAGE])


@pytest.mark.parametrize("decay", [0.0, 1.0])
def test_an_average_that_never_moves_is_refused(decay: float) -> None:
    with pytest.raises(ValueError, match="between 0 and 1"):
        AveragingAdamW([{"params": [torch.nn.Parameter(torch.zeros(2))]}], 0.1, (0.9, 0.98), decay)


def test_without_deepspeed_the_package_to_install_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == "deepspeed" else name)
    with pytest.raises(ValueError, match=r"-m pip install 'deepspeed<1,>=0\.19'$"):
        Zero()


@pytest.mark.parametrize("settings", [{"stage": 1}, {"bucket_size": 0}])
def test_settings_of_zero_out_of_range_are_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="must be"):
        Zero(**settings)


def test_zero_without_a_gpu_names_what_to_take() -> None:
    engine = Zero()
    engine.accelerator = CPUAccelerator()
    with pytest.raises(ValueError, match=r"engines/fsdp2\.yaml"):
        engine.setup_environment()


@pytest.mark.parametrize("engine", [FullyShard(), Zero()], ids=["fsdp2", "zero"])
@pytest.mark.parametrize("module", [JudgeModule("target"), DraftLMModule("target", "draft")], ids=["judge", "draft-lm"])
def test_a_module_that_stays_whole_is_sent_to_ddp(engine: FullyShard | Zero, module: pl.LightningModule) -> None:
    engine.accelerator = CUDAAccelerator()
    engine.connect(module)
    with pytest.raises(ValueError, match=rf"{type(module).__name__} is trained whole.*engines/ddp\.yaml"):
        engine.setup_environment()


def test_no_process_goes_on_before_the_kept_drafter_is_written(target_dir: Path, cache: Path, tmp_path: Path) -> None:
    written: list[bool] = []
    trainer = make_trainer(tmp_path, max_steps=1, callbacks=[KeepBestDrafter()])
    trainer.strategy.barrier = lambda name=None: written.append((tmp_path / "drafter" / "config.json").is_file())
    trainer.fit(make_module(target_dir), CacheDataModule(cache, val_fraction=0.25))
    assert not written[0]
    assert written[-1]


def test_throughput_is_the_labelled_tokens_of_all_processes_a_second(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "draftsmith.train.drafter_callbacks.throughput.time.perf_counter", itertools.count(10.0, 2.0).__next__
    )
    logged: list[tuple[str, float]] = []
    module: Any = SimpleNamespace(device=torch.device("cpu"), log=lambda name, value, **_: logged.append((name, value)))
    batch: Any = SimpleNamespace(packed=SimpleNamespace(loss_mask=torch.tensor([True, True, False])))
    # Another process has trained on five tokens meanwhile.
    monkeypatch.setattr(
        "draftsmith.train.drafter_callbacks.throughput.sum_over_ranks", lambda module, tokens: tokens + 5
    )
    trainer: Any = SimpleNamespace()
    throughput = Throughput(every=2)
    for number in range(2):
        throughput.on_train_batch_start(trainer, module, batch, number)
        throughput.on_train_batch_end(trainer, module, None, batch, number)
    assert logged == [("train/tokens_per_second", (2 + 2 + 5) / 2.0)]


def test_only_the_first_process_copies_the_average_for_a_checkpoint(
    target_dir: Path, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer, module = make_trainer(tmp_path, max_steps=1), make_module(target_dir, ema_decay=0.8)
    trainer.fit(module, CacheDataModule(cache, val_fraction=0.25))
    kept = []
    for rank in (0, 1):
        monkeypatch.setattr(type(trainer), "is_global_zero", rank == 0)
        checkpoint: dict[str, Any] = {"state_dict": {}}
        module.on_save_checkpoint(checkpoint)
        kept.append(len(checkpoint["state_dict"]))
    assert kept == [len(module.evaluated.state_dict()), 0]


def test_lightnings_own_sharding_is_refused_with_the_preset_to_take() -> None:
    with pytest.raises(ValueError, match=r"engines/fsdp2\.yaml"):
        refuse_other_engines(ModelParallelStrategy())
    refuse_other_engines(DDPStrategy())


@pytest.mark.gpu
@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_every_engine_trains_alike_on_gpus(target_dir: Path, cache: Path, tmp_path: Path) -> None:
    devices = min(2, torch.cuda.device_count())
    jobs: Sequence[Job] = [
        Job(
            engine,
            str(tmp_path / f"{engine} {precision}"),
            str(target_dir),
            str(cache),
            settings={"weight_decay": 0.1},
            trainer={"precision": precision},
        )
        for engine in ENGINES
        for precision in ("32-true", "bf16-mixed")
    ]
    alone = [replace(job, engine="one", folder=f"{tmp_path}/one {job.trainer['precision']}") for job in jobs[:2]]
    for job in alone:
        Path(job.folder).mkdir()
        run(job, 1, on_gpu=True)
    assert launch(jobs, tmp_path, devices, "gpu") == [0] * devices, (tmp_path / "log0.txt").read_text()[-2500:]
    found = Runs(tmp_path)
    for job in jobs:
        name, reference = Path(job.folder).name, f"one {job.trainer['precision']}"
        tolerance = 1e-4 if job.trainer["precision"] == "32-true" else 0.02
        expected = found.record(reference)["losses"]
        assert found.record(name)["losses"] == pytest.approx(expected, rel=tolerance), name
        if job.trainer["precision"] == "32-true":
            assert_close(found.drafter(name), found.drafter(reference), atol=1e-3)
