"""`--recipe auto`: what it chooses by the size of a cache, whose settings win, what a run says and records."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml
from training import PROMPT, MakeCache, tiny_config

from draftsmith import configs
from draftsmith.cli import main
from draftsmith.train.config_files import is_shipped, with_bases
from draftsmith.train.recipe import RECORD, Recipe, applied
from draftsmith.train.recipe_rules import BANDS, Corpus, auto

SHIPPED = Path(configs.__file__).parent
VOCABULARY = "model.init_args.draft_vocabulary"


@pytest.fixture(scope="module")
def cache(make_cache: MakeCache) -> Path:
    return make_cache([9] * 10)


def recipe_of(*arguments: str) -> Recipe:
    recipe = applied(with_bases(["fit", *arguments], tell=lambda line: None))
    assert recipe is not None
    return recipe


def chosen(recipe: Recipe) -> dict[str, object]:
    return {choice.key: choice.value for choice in recipe.chosen}


def own_file(folder: Path, cache: Path, **more: object) -> str:
    content = {"base": "eagle.yaml", "data": {"init_args": {"cache": str(cache)}}, **more}
    path = folder / "own.yaml"
    path.write_text(yaml.safe_dump(content))
    return f"--config={path}"


def test_the_recipe_changes_what_shipped_configurations_say(cache: Path) -> None:
    shipped = f"--config={SHIPPED / 'eagle.yaml'}"
    recipe = recipe_of(shipped, "--recipe", "auto", f"--data.init_args.cache={cache}")
    assert recipe.corpus == Corpus(10 * (9 - PROMPT), 10 * PROMPT)
    assert set(chosen(recipe)) == {choice.key for choice in auto(recipe.corpus)}
    assert not recipe.yours
    [last] = recipe.arguments()
    assert yaml.safe_load(last.removeprefix("--config="))["trainer"] == {"max_epochs": BANDS[0].epochs}


@pytest.mark.parametrize(
    ("setting", "key"),
    [
        ("--model.init_args.lr=5e-4", "model.init_args.lr"),
        ("--model.lr=5e-4", "model.init_args.lr"),
        ('--model.init_args={"lr": 5e-4}', "model.init_args.lr"),
        ("--trainer.max_steps=10", "trainer.max_epochs"),
        ("--model.init_args.drafter.init_args.draft_vocab_size=8", VOCABULARY),
        ("--config={model: {init_args: {lr: 5.0e-4}}}", "model.init_args.lr"),
    ],
)
def test_a_setting_of_ones_own_wins_however_it_is_given(cache: Path, setting: str, key: str) -> None:
    everything = recipe_of(f"--config={SHIPPED / 'eagle.yaml'}", "--recipe=auto", f"--data.init_args.cache={cache}")
    recipe = recipe_of(
        f"--config={SHIPPED / 'eagle.yaml'}", setting, "--recipe=auto", f"--data.init_args.cache={cache}"
    )
    assert set(chosen(everything)) - set(chosen(recipe)) == {key}
    [(choice, own)] = recipe.yours
    assert choice.key == key
    assert any(f"{key} is left to you: you set {own}" in line for line in recipe.lines())


def test_a_setting_in_ones_own_file_wins_and_its_base_does_not(tmp_path: Path, cache: Path) -> None:
    recipe = recipe_of(own_file(tmp_path, cache, recipe="auto", trainer={"max_epochs": 3}))
    assert [choice.key for choice, _ in recipe.yours] == ["trainer.max_epochs"]
    assert "model.init_args.lr" in chosen(recipe), "eagle.yaml says a rate, and it is no file of the user's"


def test_a_copy_of_a_shipped_file_is_shipped_until_it_is_changed(tmp_path: Path) -> None:
    copy = tmp_path / "eagle.yaml"
    copy.write_bytes((SHIPPED / "eagle.yaml").read_bytes())
    assert is_shipped(copy)
    copy.write_text(copy.read_text() + "seed_everything: 1\n")
    assert not is_shipped(copy)
    assert not is_shipped(tmp_path / "missing.yaml")


def test_larger_text_is_read_less_often_and_unmeasured_sizes_keep_the_configuration() -> None:
    epochs = [auto(Corpus(band.below - 1, 10))[0].value for band in BANDS]
    assert epochs == sorted(epochs, reverse=True)
    assert auto(Corpus(BANDS[-1].below, 10)) == []
    assert "more than was measured" in Recipe("auto", Corpus(BANDS[-1].below, 10), (), ()).lines()[0]


def test_a_run_from_a_trained_drafter_keeps_its_vocabulary_and_the_configured_rate(tmp_path: Path, cache: Path) -> None:
    recipe = recipe_of(own_file(tmp_path, cache, recipe="auto"), "--model.init_args.init_from", "runs/first/drafter")
    assert recipe.corpus.starts_from == "runs/first/drafter"
    assert {VOCABULARY, "model.init_args.lr"}.isdisjoint(chosen(recipe))


def test_a_recipe_that_does_not_exist_names_those_that_do(
    tmp_path: Path, cache: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["train", "fit", own_file(tmp_path, cache), "--recipe", "best"]) != 0
    assert "recipe is 'best'; known recipes: auto" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("base", "reason"),
    [
        ("judge.yaml", "whose model is DraftModule, and here it is JudgeModule"),
        ("draft_lm.yaml", "here it is DraftLMModule"),
        ("online.yaml", "whose data is CacheDataModule, and here it is OnlineDataModule"),
    ],
)
def test_a_run_of_another_kind_or_without_a_cache_takes_no_recipe(tmp_path: Path, base: str, reason: str) -> None:
    path = tmp_path / "own.yaml"
    path.write_text(f"base: {base}\nrecipe: auto\n")
    with pytest.raises(ValueError, match=reason):
        recipe_of(f"--config={path}")


def test_a_run_whose_cache_is_not_named_is_an_error() -> None:
    classes = ["--model.class_path=DraftModule", "--data.class_path=CacheDataModule"]
    with pytest.raises(ValueError, match=r"give data\.init_args\.cache"):
        recipe_of("--recipe=auto", *classes)


def test_without_the_option_nothing_is_read(tmp_path: Path) -> None:
    assert applied(["fit", own_file(tmp_path, tmp_path / "missing"), "--recipe=null"]) is None


def test_a_draft_vocabulary_of_a_shipped_configuration_gives_way(
    cache: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shipped = f"--config={SHIPPED / 'real_eagle.yaml'}"
    with pytest.raises(SystemExit) as exit_info:
        main(["train", "fit", shipped, "--recipe=auto", f"--data.init_args.cache={cache}", "--print_config"])
    assert exit_info.value.code == 0
    settings = yaml.safe_load(capsys.readouterr().out)["model"]["init_args"]
    assert settings["draft_vocabulary"] == "covering"
    assert settings["drafter"]["init_args"]["draft_vocab_size"] is None


def test_a_run_takes_the_choices_prints_them_and_keeps_the_record(
    target_dir: Path, cache: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config = tiny_config(tmp_path, target_dir, cache)
    flags = ["--recipe=auto", "--trainer.max_epochs=1", "--model.init_args.distillation=path"]
    with caplog.at_level("INFO"):
        assert main(["train", "fit", f"--config={config}", *flags]) == 0
    assert "recipe auto: the cache has 60 labelled tokens and 30 of prompts" in caplog.text
    assert "recipe auto: trainer.max_epochs is left to you" in caplog.text
    assert "its draft vocabulary is" in caplog.text
    record = json.loads((tmp_path / "run" / RECORD).read_text())
    assert record["corpus"]["labelled_tokens"] == 60
    assert {each["key"] for each in record["chosen"]} == {"model.init_args.lr", VOCABULARY}
    saved = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())
    assert saved["model"]["init_args"]["draft_vocabulary"] == "covering"
    with caplog.at_level("INFO"):
        assert main(["train", "fit", f"--config={config}", "--trainer.max_epochs=1", "--replace_best=true"]) == 0
    assert not (tmp_path / "run" / RECORD).exists(), "a run without a recipe keeps no record of another one"
