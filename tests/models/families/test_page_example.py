"""The package of the page on new families, built from the page's own blocks: it trains by the page's YAML, and drafts losslessly."""

import importlib
import json
import re
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from every_family import batch_of, fresh
from heads import deep_target
from own_data import OwnData
from pages import ROOT

from draftsmith.cli import main
from draftsmith.data.cache.reader import HiddenStateCache
from draftsmith.decode.engine import Engine
from draftsmith.decode.sampling import GenerationSettings
from draftsmith.evaluate.doctor.serving import served_logits, trained_logits
from draftsmith.evaluate.doctor.tree_serving import tree_and_chain_logits
from draftsmith.export.layouts.shipped_code import shipped_code
from draftsmith.models import DraftLimits, Family, Target, register
from draftsmith.models.drafters.drafter_folder import load_drafter

PAGE = (ROOT / "docs" / "how-to" / "drafters" / "new-family.md").read_text(encoding="utf-8")
MODULE = re.compile(r"This is `(?P<path>[\w/]+\.py)`:\n\n```python\n(?P<code>.*?)^```$", re.DOTALL | re.MULTILINE)
NUM_STEPS = 3
SHORT = """
trainer: {accelerator: cpu, max_epochs: 16, check_val_every_n_epoch: 16, val_check_interval: 1.0, enable_progress_bar: false}
model: {init_args: {lr: 2.0e-2}}
data: {init_args: {val_fraction: 0.2, tokens_per_batch: 500}}
"""


def blocks(language: str) -> list[str]:
    """The page's blocks of code in one language."""
    return re.findall(rf"^```{language}\n(.*?)^```$", PAGE, re.DOTALL | re.MULTILINE)


def entry_points() -> dict[str, str]:
    """The families that the page's package names once it has all its modules."""
    project = tomllib.loads(blocks("toml")[-1])["project"]
    return dict(project["entry-points"]["draftsmith.families"])


@pytest.fixture(scope="module")
def hydra(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Family]:
    """The record of the heads that read what was drafted, from the page's package."""
    site = tmp_path_factory.mktemp("site")
    [package] = tomllib.loads(blocks("toml")[0])["tool"]["setuptools"]["packages"]
    (site / package).mkdir()
    (site / package / "__init__.py").touch()
    for module in MODULE.finditer(PAGE):
        (site / module["path"]).write_text(module["code"], encoding="utf-8")
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(site)
        module, _, name = entry_points()["hydra"].partition(":")
        family = getattr(importlib.import_module(module), name)
        register(family)
        yield family
    for name in [name for name in sys.modules if name.partition(".")[0] == package]:
        del sys.modules[name]


def test_every_module_on_the_page_has_a_name_and_every_entry_point_a_module() -> None:
    modules = {module["path"]: module["code"] for module in MODULE.finditer(PAGE)}
    assert list(modules.values()) == blocks("python"), "a block of Python under no name is run by no test"
    for value in entry_points().values():
        module, _, name = value.partition(":")
        assert f"\n{name} = Family(\n" in modules[module.replace(".", "/") + ".py"]
    assert (
        entry_points().items()
        > tomllib.loads(blocks("toml")[0])["project"]["entry-points"]["draftsmith.families"].items()
    )


@pytest.fixture(scope="module")
def trained(hydra: Family, own_data: OwnData, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run by the page's YAML, with this test's target, cache and folder, the other class, and fewer steps."""
    folder = tmp_path_factory.mktemp("hydra")
    [text] = blocks("yaml")
    settings = hydra.settings
    for shown, ours in {
        "medusa_heads.heads.ParallelHeadsFamily": f"{settings.__module__}.{settings.__name__}",
        "org/name": str(own_data.target),
        "runs/mine/cache": str(own_data.cache),
        "runs/medusa/train": str(folder / "train"),
        "num_prompts: 32, max_new_tokens: 128, batch_size: 8": "num_prompts: 2, max_new_tokens: 8, time_share: null",
    }.items():
        assert text.count(shown) == 1, shown
        text = text.replace(shown, ours)
    (folder / "hydra.yaml").write_text(text)
    (folder / "short.yaml").write_text(f"base: hydra.yaml\n{SHORT}")
    assert main(["train", "fit", "--config", str(folder / "short.yaml")]) == 0
    return folder / "train"


def test_training_and_decoding_agree_on_the_pages_heads(hydra: Family) -> None:
    target = deep_target(num_layers=2)
    drafter = fresh(hydra, target.ends)
    batch = batch_of(target, drafter)
    before = trained_logits(drafter, batch, [2, 9], NUM_STEPS)
    torch.testing.assert_close(served_logits(drafter, batch, [2, 9], NUM_STEPS), before, rtol=1e-4, atol=1e-4)
    in_tree, in_chain = tree_and_chain_logits(drafter, batch, 7)
    torch.testing.assert_close(in_tree, in_chain, rtol=1e-4, atol=1e-4)


def test_the_pages_heads_train_by_its_yaml_and_decode_the_targets_own_text(
    hydra: Family, own_data: OwnData, trained: Path
) -> None:
    target, drafter = Target.load(str(own_data.target)), load_drafter(trained / "drafter")
    assert type(drafter) is hydra.drafter
    cache = HiddenStateCache(own_data.cache)
    prompts = [cache[number].input_ids.tolist()[:-16] for number in range(3)]
    settings = GenerationSettings(max_new_tokens=24)
    plain = [reply.token_ids for reply in Engine(target).generate(prompts, settings)]
    assert hydra.limits is not None
    for limits in (hydra.limits, DraftLimits(2, NUM_STEPS), DraftLimits(3, 2, node_budget=5)):
        drafted = Engine(target, drafter, limits).generate(prompts, settings)
        assert [reply.token_ids for reply in drafted] == plain
        assert any(any(reply.accepted) for reply in drafted), "no draft was ever accepted"


def test_a_run_records_the_family_of_its_drafter(hydra: Family, trained: Path) -> None:
    recorded = json.loads((trained / "drafter" / "provenance.json").read_text())
    assert recorded["config"]["drafter"]["family"] == hydra.name


def test_the_code_of_both_modules_ships_without_their_settings(hydra: Family) -> None:
    modules = shipped_code(hydra.drafter).modules
    names = {name for name in modules if name.startswith("family_")}
    assert names == {"family_medusa_heads_heads", "family_medusa_heads_hydra"}
    assert all("HeadsFamily" not in modules[name] for name in names)
