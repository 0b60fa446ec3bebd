"""Earlier module names and public names keep working, wherever a module lies today."""

import importlib
from pathlib import Path

import pytest

from draftsmith import train
from draftsmith.cli import main
from draftsmith.moved import MOVED

ROOT = Path(__file__).resolve().parents[2]
EARLIER = {
    "draftsmith.train.DraftModule": "draftsmith.train.draft_module.DraftModule",
    "draftsmith.train.CacheDataModule": "draftsmith.train.data_module.CacheDataModule",
    "draftsmith.train.TreeDecodeValidation": "draftsmith.train.callbacks.TreeDecodeValidation",
    "draftsmith.train.KeepBestDrafter": "draftsmith.train.callbacks.KeepBestDrafter",
    "draftsmith.train.Throughput": "draftsmith.train.callbacks.Throughput",
}


@pytest.mark.parametrize("earlier", sorted(MOVED))
def test_a_moved_module_answers_to_its_earlier_name(earlier: str) -> None:
    now = importlib.import_module(MOVED[earlier])
    then = importlib.import_module(earlier)
    public = [name for name in vars(now) if not name.startswith("_")]
    assert public
    assert all(getattr(then, name) is getattr(now, name) for name in public)


@pytest.mark.parametrize("name", dir(train))
def test_public_names_of_training_are_classes(name: str) -> None:
    assert isinstance(getattr(train, name), type)


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'DraftModul'"):
        _ = train.DraftModul


def test_a_room_offers_what_the_module_before_it_held() -> None:
    from draftsmith.data.cache import HiddenStateCache
    from draftsmith.models.target import Target
    from draftsmith.models.tree import DraftTree

    assert (Target.__module__, DraftTree.__module__) == (
        "draftsmith.models.target.target",
        "draftsmith.models.tree.tree",
    )
    assert HiddenStateCache.__module__ == "draftsmith.data.cache.reader"


def test_a_yaml_with_earlier_class_paths_is_a_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    texts = {name: (ROOT / "configs" / name).read_text(encoding="utf-8") for name in ("base.yaml", "redrafter.yaml")}
    for name, earlier in EARLIER.items():
        assert any(name in text for text in texts.values())
        texts = {
            file: text.replace(f"class_path: {name}\n", f"class_path: {earlier}\n") for file, text in texts.items()
        }
    for file, text in texts.items():
        (tmp_path / file).write_text(text, encoding="utf-8")
    with pytest.raises(SystemExit) as stopped:
        main(["train", "fit", "--config", str(tmp_path / "redrafter.yaml"), "--print_config"])
    assert stopped.value.code == 0, capsys.readouterr().err
