"""A family that lives in these tests alone goes the whole way: training, validation, decoding, evaluation, export."""

import json
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from own_data import OwnData
from parallel_heads import FAMILY, ParallelHeads, ParallelHeadsFamily
from transformers import AutoModel, AutoModelForCausalLM

from draftsmith.cli import main
from draftsmith.data.cache.reader import HiddenStateCache
from draftsmith.decode.engine import Engine
from draftsmith.decode.hugging_face.hf_generate import generate
from draftsmith.decode.sampling import GenerationSettings
from draftsmith.export.layouts.layouts import load_any
from draftsmith.models import DraftLimits, Target, all_families, register
from draftsmith.models.drafters.drafter_folder import load_drafter
from draftsmith.models.tree.limits import SampledChildren
from draftsmith.models.tree.shapes import shape_text
from draftsmith.train.drafter_callbacks.tree_decode_validation import TreeDecodeValidation

NUM_STEPS = 3
assert FAMILY.limits is not None
TREE = FAMILY.limits.paths
PROMPT = "How many apples does Tom have now?"


@dataclass(frozen=True)
class Run:
    """Folders of one run: the target, its prompts and cache, and the YAML of the training."""

    target: Path
    prompts: Path
    cache: Path
    yaml: Path
    train: Path

    @property
    def drafter(self) -> Path:
        """The trained drafter."""
        return self.train / "drafter"


YAML = """
seed_everything: 0
trainer:
  accelerator: cpu
  devices: 1
  max_epochs: 40
  check_val_every_n_epoch: 20
  default_root_dir: {train}
  enable_progress_bar: false
  num_sanity_val_steps: 0
  log_every_n_steps: 1
  logger:
    class_path: pytorch_lightning.loggers.CSVLogger
    init_args: {{save_dir: {train}, name: null, version: ""}}
  callbacks:
    - class_path: draftsmith.train.TreeDecodeValidation
      init_args: {{num_prompts: 2, max_new_tokens: 8, time_share: null}}
    - class_path: draftsmith.train.KeepBestDrafter
    - class_path: pytorch_lightning.callbacks.ModelCheckpoint
      init_args: {{dirpath: {train}/checkpoints, save_top_k: 0, save_last: true}}
model:
  class_path: draftsmith.train.DraftModule
  init_args:
    target: {target}
    drafter: {{class_path: parallel_heads.ParallelHeadsFamily, init_args: {{num_blocks: 1}}}}
    num_steps: 3
    distillation: path
    lr: 1.0e-2
    metrics_every: 1
data:
  class_path: draftsmith.train.CacheDataModule
  init_args: {{cache: {cache}, val_fraction: 0.2, tokens_per_batch: 500}}
"""


@pytest.fixture(scope="module")
def run(own_data: OwnData, tmp_path_factory: pytest.TempPathFactory) -> Run:
    register(FAMILY)
    folder = tmp_path_factory.mktemp("family")
    yaml = folder / "run.yaml"
    yaml.write_text(YAML.format(train=folder / "train", target=own_data.target, cache=own_data.cache))
    assert main(["train", "fit", "--config", str(yaml)]) == 0
    return Run(own_data.target, own_data.prompts, own_data.cache, yaml, folder / "train")


def texts(run: Run) -> list[list[int]]:
    """The token ids that the drafter was trained on."""
    cache = HiddenStateCache(run.cache)
    return [cache[number].input_ids.tolist() for number in range(len(cache))]


@pytest.fixture(scope="module")
def target(run: Run) -> Target:
    return Target.load(str(run.target))


@pytest.fixture(scope="module")
def drafter(run: Run) -> ParallelHeads:
    found = load_drafter(run.drafter)
    assert isinstance(found, ParallelHeads)
    return found


def test_training_has_changed_every_head(run: Run, target: Target, drafter: ParallelHeads) -> None:
    began = ParallelHeadsFamily().build(target.ends, None, NUM_STEPS, "")
    assert drafter.max_draft_steps == NUM_STEPS
    for head, before in zip(drafter.heads, began.heads, strict=True):
        assert not torch.equal(head.weight, before.weight)


def test_validation_decodes_with_the_familys_static_tree(run: Run, drafter: ParallelHeads) -> None:
    logged = (run.train / "metrics.csv").read_text()
    assert "val/tokens_per_step" in logged
    assert "val/accept_depth3" in logged, "the tree is three deep"

    class Module:
        evaluated = drafter
        objective = type("Objective", (), {"num_steps": NUM_STEPS})

    callback = TreeDecodeValidation()
    assert callback.limits_for(Module()).paths == TREE  # type: ignore[arg-type]
    assert TreeDecodeValidation(shape="t2.1").limits_for(Module()).paths == ((0,), (1,), (0, 0), (1, 0))  # type: ignore[arg-type]
    assert TreeDecodeValidation(beam_width=2).limits_for(Module()) == DraftLimits(2, NUM_STEPS)  # type: ignore[arg-type]


def test_a_shape_beside_the_settings_it_replaces_is_refused() -> None:
    with pytest.raises(ValueError, match="shape 't2' says all of draft_length"):
        TreeDecodeValidation(shape="t2", beam_width=2)


def changed(run: Run, folder: Path, *changes: tuple[str, str]) -> str:
    """A YAML like the run's, in a folder of its own, with changes of its text."""
    text = run.yaml.read_text()
    for before, after in ((str(run.train), str(folder / "train")), *changes):
        assert before in text
        text = text.replace(before, after)
    (folder / "changed.yaml").write_text(text)
    return str(folder / "changed.yaml")


def test_a_deeper_validation_is_refused_before_training(
    run: Run, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    yaml = changed(run, tmp_path, ("num_prompts: 2,", "num_prompts: 2, shape: 1x4,"))
    assert main(["train", "fit", "--config", yaml]) == 1
    assert "a draft of 4 tokens is asked for, this ParallelHeads has heads for 3" in capsys.readouterr().err


def test_training_resumes(run: Run, tmp_path: Path) -> None:
    yaml = changed(run, tmp_path, ("max_epochs: 40", "max_epochs: 42"), ("epoch: 20", "epoch: 2"))
    assert main(["train", "fit", "--config", yaml, "--ckpt_path", str(run.train / "checkpoints" / "last.ckpt")]) == 0
    logged = (tmp_path / "train" / "metrics.csv").read_text().splitlines()
    places = [name for name in range(len(logged[0].split(","))) if logged[0].split(",")[name] == "step"]
    assert min(int(line.split(",")[places[0]]) for line in logged[1:]) >= 39, "it began anew"


def test_an_adapter_is_trained_on_it_and_decodes(run: Run, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    lora = f"num_steps: 3\n    init_from: {run.drafter}\n    lora: {{rank: 2}}"
    yaml = changed(
        run, tmp_path, ("num_steps: 3", lora), ("max_epochs: 40", "max_epochs: 2"), ("epoch: 20", "epoch: 2")
    )
    assert main(["train", "fit", "--config", yaml]) == 0
    adapter = tmp_path / "train" / "drafter"
    assert (adapter / "bond.json").is_file()
    words = ["--target", str(run.target), "--drafter-adapter", str(adapter), "--max-new-tokens", "8"]
    assert main(["decode", "--prompt", PROMPT, *words]) == 0
    assert "tokens per step" in capsys.readouterr().out


@pytest.mark.parametrize(
    "limits",
    [FAMILY.limits, DraftLimits(2, 3), DraftLimits(3, 2, node_budget=5), DraftLimits(sampled=SampledChildren((2, 1)))],
    ids=shape_text,
)
def test_decoding_gives_the_targets_own_text(
    run: Run, target: Target, drafter: ParallelHeads, limits: DraftLimits
) -> None:
    prompts = [row[:-16] for row in texts(run)][:3]
    temperature = 0.0 if limits.sampled is None else 1.0
    settings = GenerationSettings(max_new_tokens=24, temperature=temperature)
    drafted = Engine(target, drafter, limits).generate(prompts, settings)
    if limits.sampled is None:
        plain = Engine(target).generate(prompts, settings)
        assert [one.token_ids for one in drafted] == [one.token_ids for one in plain]
    assert any(any(one.accepted) for one in drafted), "no draft was ever accepted"


def test_the_doctor_finds_no_fault(run: Run) -> None:
    report = run.train / "doctor.json"
    words = [
        "--drafter",
        str(run.drafter),
        "--target",
        str(run.target),
        "--cache",
        str(run.cache),
        "--out",
        str(report),
    ]
    assert main(["doctor", *words]) == 0
    findings = {one["name"]: one["verdict"] for one in json.loads(report.read_text())["findings"]}
    assert findings["train-serve"] == "ok"
    assert findings["acceptance"] == "ok"


def test_evaluate_measures_the_familys_own_shape(run: Run, tmp_path: Path) -> None:
    words = ["--target", str(run.target), "--drafters", f"toy={run.drafter}", "--prompts", str(run.prompts)]
    words += ["--limit", "2", "--max-new-tokens", "8", "--transformers-prompts", "0", "--ledger-prompts", "0"]
    assert main(["evaluate", *words, "--out", str(tmp_path)]) == 0
    rows = json.loads((tmp_path / "report.json").read_text())["rows"]
    [row] = [row for row in rows if row["drafter"] == "toy"]
    assert row["shape"] == shape_text(FAMILY.limits)  # type: ignore[arg-type]
    assert row["exact_share"] == 1.0


def test_tune_leaves_out_what_is_deeper_than_the_heads(run: Run, tmp_path: Path) -> None:
    words = [
        "--target",
        str(run.target),
        "--drafter",
        str(run.drafter),
        "--prompts",
        str(run.prompts),
        "--out",
        str(tmp_path),
    ]
    words += [
        "--widths",
        "1,2",
        "--depths",
        "2,8",
        "--nodes",
        "3",
        "--limit",
        "2",
        "--max-new-tokens",
        "8",
        "--rounds",
        "1",
    ]
    assert main(["tune", *words]) == 0
    tuned = json.loads((tmp_path / "tune.json").read_text())
    assert "1x3" in json.dumps(tuned)
    assert "1x8" not in json.dumps(tuned)


def test_the_own_layout_is_read_back(run: Run, target: Target, drafter: ParallelHeads, tmp_path: Path) -> None:
    assert main(["export", "--drafter", str(run.drafter), "--out", str(tmp_path / "out")]) == 0
    for again in (load_any(tmp_path / "out", target.ends), AutoModel.from_pretrained(tmp_path / "out")):
        assert type(again) is ParallelHeads
        assert all(torch.equal(tensor, again.state_dict()[name]) for name, tensor in drafter.state_dict().items())
    card = (tmp_path / "out" / "README.md").read_text()
    assert "# A Medusa draft head for" in card
    assert "tags: [speculative-decoding, draft-head, medusa]" in card
    assert "`python -m pip install draftsmith`, and the module `parallel_heads`" in card, "no distribution names it"


def test_a_layout_of_another_family_is_refused(run: Run, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    foreign = next(family for family in all_families() if family.layouts)
    from draftsmith.export.layouts.layouts import other_software_layouts

    layout = other_software_layouts(foreign)[0].name
    assert main(["export", "--drafter", str(run.drafter), "--out", str(tmp_path / "out"), "--layout", layout]) == 1
    assert f"is for {foreign.about.title}, this drafter is Medusa" in capsys.readouterr().err


def test_transformers_decodes_with_the_exported_folder(run: Run, tmp_path: Path) -> None:
    folder = tmp_path / "out"
    words = [
        "--drafter",
        str(run.drafter),
        "--out",
        str(folder),
        "--layout",
        "custom_generate",
        "--target",
        str(run.target),
    ]
    assert main(["export", *words]) == 0
    limits = json.loads((folder / "custom_generate" / "settings.json").read_text())["limits"]
    assert [tuple(path) for path in limits["paths"]] == list(TREE or ())
    model, prompt = AutoModelForCausalLM.from_pretrained(run.target), torch.tensor([[5, 9, 20, 31]])
    plain = model.generate(prompt, do_sample=False, max_new_tokens=20)
    for given in ({}, {"beam_width": 2, "draft_length": 3}, {"paths": [[0], [1]]}):
        found = generate(model, prompt, drafter=folder, do_sample=False, max_new_tokens=20, **given)
        assert torch.equal(found, plain), given
