"""A configuration may change another one, and the run's folder is typed once."""

from pathlib import Path

import pytest
import yaml
from training import MakeCache, tiny_config

from draftsmith import configs
from draftsmith.cli import main
from draftsmith.train.config_files import MOVED, with_bases

CONFIG_FOLDER = Path(configs.__file__).parent


def write(path: Path, **content: object) -> Path:
    path.write_text(yaml.safe_dump(content), encoding="utf-8")
    return path


def test_bases_are_read_first_and_once(tmp_path: Path) -> None:
    lowest = write(tmp_path / "lowest.yaml", trainer={})
    middle = write(tmp_path / "middle.yaml", base="lowest.yaml")
    own, other = write(tmp_path / "own.yaml", base="middle.yaml"), write(tmp_path / "other.yaml", base="middle.yaml")
    assert with_bases(["fit", "--config", str(own), f"--config={other}", "--trainer.max_epochs", "2"]) == [
        "fit",
        *(f"--config={file}" for file in (lowest, middle, own, other)),
        "--trainer.max_epochs",
        "2",
    ]


def test_files_without_a_base_and_what_is_no_file_are_left_to_the_parser(tmp_path: Path) -> None:
    broken = tmp_path / "broken.yaml"
    broken.write_text("a: [", encoding="utf-8")
    arguments = [
        "fit",
        f"--config={broken}",
        "--config=missing.yaml",
        f"--config={write(tmp_path / 'a.yaml', b=1)}",
        "--config={cache: s3://bucket/a}",
    ]
    assert with_bases(arguments) == arguments
    assert with_bases(["fit", "--config"]) == ["fit", "--config"]


def test_a_base_that_is_missing_or_its_own_base_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="neither a file beside this one nor one of draftsmith's configurations"):
        with_bases(["--config", str(write(tmp_path / "a.yaml", base="missing.yaml"))])
    write(tmp_path / "b.yaml", base="c.yaml")
    with pytest.raises(ValueError, match="whose base is this file"):
        with_bases(["--config", str(write(tmp_path / "c.yaml", base="b.yaml"))])


def test_a_shipped_configuration_is_a_base_from_any_folder(tmp_path: Path) -> None:
    bases = with_bases(["--config", str(write(tmp_path / "own.yaml", base="hass.yaml"))])[:-1]
    assert [Path(one.partition("=")[2]).name for one in bases] == ["base.yaml", "eagle.yaml", "hass.yaml"]


@pytest.mark.parametrize("earlier", MOVED)
def test_a_configuration_that_moved_is_found_by_its_earlier_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, earlier: str
) -> None:
    monkeypatch.chdir(CONFIG_FOLDER.parent)
    with caplog.at_level("INFO"):
        assert with_bases(["--config", f"configs/{earlier}"]) == [f"--config={Path('configs') / MOVED[earlier]}"]
    assert f"configs/{earlier} is now configs/{MOVED[earlier]}" in caplog.text
    monkeypatch.chdir(tmp_path)
    assert with_bases([f"--config={earlier}"]) == [f"--config={CONFIG_FOLDER / MOVED[earlier]}"]
    write(tmp_path / "own.yaml", base=earlier)
    assert with_bases(["--config=own.yaml"]) == [f"--config={CONFIG_FOLDER / MOVED[earlier]}", "--config=own.yaml"]


def test_a_file_of_ones_own_with_an_earlier_name_is_that_file(tmp_path: Path) -> None:
    own = write(tmp_path / "engine_ddp.yaml", trainer={"devices": 2})
    assert with_bases([f"--config={own}"]) == [f"--config={own}"]


def test_a_base_may_lie_in_a_folder_of_the_shipped_configurations(tmp_path: Path) -> None:
    own = write(tmp_path / "own.yaml", base="engines/ddp.yaml")
    assert with_bases([f"--config={own}"]) == [f"--config={CONFIG_FOLDER / 'engines' / 'ddp.yaml'}", f"--config={own}"]
    with pytest.raises(ValueError, match="neither a file beside this one nor one of draftsmith's configurations"):
        with_bases(["--config", str(write(tmp_path / "up.yaml", base="../configs/hass.yaml"))])


def test_a_run_changes_its_base_and_its_saved_configuration_needs_no_other_file(
    target_dir: Path, make_cache: MakeCache, tmp_path: Path
) -> None:
    base = tiny_config(tmp_path, target_dir, make_cache([9] * 10))
    content = yaml.safe_load(base.read_text(encoding="utf-8"))
    content["trainer"]["logger"] = {"class_path": "RunLogger"}
    base.write_text(yaml.safe_dump(content), encoding="utf-8")
    change = write(tmp_path / "change.yaml", base=base.name, model={"init_args": {"lr": 0.25}})
    root = tmp_path / "elsewhere"
    assert main(["train", "fit", f"--config={change}", f"--trainer.default_root_dir={root}"]) == 0
    saved = yaml.safe_load((root / "config.yaml").read_text(encoding="utf-8"))
    assert (saved["model"]["init_args"]["lr"], saved["base"]) == (0.25, None)
    assert list(root.glob("events.out.tfevents.*")), "logs belong in the run's folder"
    assert (root / "drafter").is_dir()


def test_logs_may_go_elsewhere(target_dir: Path, make_cache: MakeCache, tmp_path: Path) -> None:
    config = tiny_config(tmp_path, target_dir, make_cache([9] * 10))
    content = yaml.safe_load(config.read_text(encoding="utf-8"))
    content["trainer"] |= {"logger": {"class_path": "draftsmith.train.RunLogger"}, "max_epochs": 1}
    config.write_text(yaml.safe_dump(content), encoding="utf-8")
    logs = tmp_path / "logs"
    assert main(["train", "fit", f"--config={config}", f"--trainer.logger.init_args.save_dir={logs}"]) == 0
    assert list(logs.glob("events.out.tfevents.*"))
