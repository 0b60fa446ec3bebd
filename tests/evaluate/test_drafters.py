import shutil
from pathlib import Path

import pytest

from draftsmith.evaluate.drafters import names_apart, parse_entries
from draftsmith.models.tree.limits import DraftLimits


def test_entries_have_names_and_may_have_shapes_of_their_own(drafter: Path) -> None:
    entries = parse_entries([str(drafter), f"wide={drafter}@10x4,2x3"], ["1x4"])
    assert [entry.name for entry in entries] == [drafter.name, "wide"]
    assert [len(entry.shapes) for entry in entries] == [1, 2]
    assert entries[1].shapes[0] == DraftLimits(10, 4)


@pytest.mark.parametrize(
    ("given", "taken", "names"),
    [
        (["a/drafter", "b/drafter"], [], ["a", "b"]),
        (["a/train/drafter", "b/train/drafter", "wide"], [], ["a/train", "b/train", "wide"]),
        (["x/a/drafter", "x/b/drafter", "y/b/drafter"], [], ["x/a", "x/b", "y/b"]),
        (["x/a", "x/a/drafter", "x/b/drafter"], [], ["a", "x/a", "x/b"]),
        (["org/small", "other/small", "embedded:draft_lm"], [], ["org", "other", "draft_lm"]),
        (["runs/plain", "runs/mine"], ["plain"], ["runs", "mine"]),
        (["a/drafter", "a/drafter"], [], ["drafter", "drafter"]),
    ],
)
def test_folders_of_one_name_are_called_after_their_parents(
    given: list[str], taken: list[str], names: list[str]
) -> None:
    assert names_apart(given, taken) == names


def test_entries_in_folders_of_one_name_are_told_apart(drafter: Path, tmp_path: Path) -> None:
    for name in "ab":
        shutil.copytree(drafter, tmp_path / name / "drafter")
    words = [str(tmp_path / "a" / "drafter"), f"{tmp_path / 'b' / 'drafter'}@2x3", f"mine={drafter}"]
    assert [entry.name for entry in parse_entries(words, ["1x4"])] == ["a", "b", "mine"]


def test_an_embedded_draft_lm_is_an_entry_by_its_name() -> None:
    entries = parse_entries(["embedded:draft_lm", "lm=embedded:draft_lm@1x5,s1.1.1"], ["1x4"])
    assert [entry.name for entry in entries] == ["draft_lm", "lm"]
    assert all((entry.path / "model.safetensors").is_file() for entry in entries)
    assert [len(entry.shapes) for entry in entries] == [1, 2]


def test_an_entrys_own_shapes_may_be_of_every_kind(drafter: Path, tmp_path: Path) -> None:
    file = tmp_path / "tree.json"
    file.write_text("[[0], [1], [0, 0]]")
    [entry] = parse_entries([f"mine={drafter}@tree:{file},t3.2,10x6n60,paths:0.0+0.1+1,k4.2e0.5"], [])
    assert entry.shapes[0].paths == ((0,), (1,), (0, 0))
    assert [limits.max_nodes for limits in entry.shapes] == [4, 10, 61, 5, 13]


def test_entries_that_cannot_be_told_apart_or_found_are_refused(drafter: Path) -> None:
    with pytest.raises(ValueError, match="is taken; name the drafters apart"):
        parse_entries([str(drafter), str(drafter)], ["1x4"])
    with pytest.raises(ValueError, match="'plain' is taken"):
        parse_entries([f"plain={drafter}"], ["1x4"])
    with pytest.raises(ValueError, match=r"is no folder with a config.json"):
        parse_entries(["runs/nowhere"], ["1x4"])
    with pytest.raises(ValueError, match="has no shape"):
        parse_entries([str(drafter)], [])
    with pytest.raises(ValueError, match="has one shape twice"):
        parse_entries([str(drafter)], ["1x4", "1x4"])
