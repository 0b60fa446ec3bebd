"""A folder is replaced only by the stage that wrote it, and only while nobody else has put anything into it."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from draftsmith import provenance
from draftsmith.cli import main
from draftsmith.files import atomic_directory
from draftsmith.ownership import (
    CLAIM_FILE,
    check_begun,
    check_output_file,
    check_replaceable,
    check_unclaimed,
    read_claim,
)

STAGE = "draftsmith weave"


def weave(path: Path, *names: str, stage: str = STAGE) -> Path:
    with atomic_directory(path, stage) as folder:
        for name in names or ("cloth",):
            (folder / name).parent.mkdir(exist_ok=True)
            (folder / name).write_text("woven")
    return path


def content(folder: Path) -> dict[str, str]:
    return {str(path.relative_to(folder)): path.read_text() for path in folder.rglob("*") if path.is_file()}


def letters(folder: Path) -> None:
    folder.mkdir()
    (folder / "letter.txt").write_text("mine")


def same_names(folder: Path) -> None:
    folder.mkdir()
    (folder / "cloth").write_text("mine")
    (folder / CLAIM_FILE).write_text('{"command": "draftsmith weave"}')


def with_a_note(folder: Path) -> None:
    weave(folder)
    (folder / "note.txt").write_text("mine")


def with_a_note_below(folder: Path) -> None:
    weave(folder, "deep/cloth")
    (folder / "deep" / "note.txt").write_text("mine")


def of_another_stage(folder: Path) -> None:
    weave(folder, stage="draftsmith dye")


def with_a_link(folder: Path) -> None:
    weave(folder)
    (folder / "link").symlink_to(folder / "cloth")


def with_a_broken_claim(folder: Path) -> None:
    weave(folder)
    (folder / CLAIM_FILE).write_text('{"folder": {"stage": "draftsmith weave", "entries": "all"}}')


@pytest.mark.parametrize(
    ("make", "told"),
    [
        (letters, "holds letter.txt, which `draftsmith weave` did not write"),
        (same_names, r"holds cloth, provenance.json, .* \(if an earlier version of draftsmith wrote it, delete it"),
        (with_a_note, "holds note.txt, which"),
        (with_a_note_below, r"holds deep/note.txt, which"),
        (of_another_stage, "`draftsmith dye` wrote"),
        (with_a_link, "holds link, which"),
        (with_a_broken_claim, "holds cloth, provenance.json"),
    ],
)
def test_what_a_stage_did_not_write_is_never_replaced(tmp_path: Path, make: Callable[[Path], None], told: str) -> None:
    folder = tmp_path / "out"
    make(folder)
    before = content(folder)
    with pytest.raises(ValueError, match=told):
        check_replaceable(folder, STAGE)
    with pytest.raises(ValueError, match=told):
        weave(folder, "new")
    assert content(folder) == before
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_what_comes_into_the_folder_during_the_work_is_kept(tmp_path: Path) -> None:
    folder = weave(tmp_path / "out")
    with pytest.raises(ValueError, match=r"holds note.txt, which"), atomic_directory(folder, STAGE):
        (folder / "note.txt").write_text("mine")
    assert content(folder)["note.txt"] == "mine"
    assert content(folder)["cloth"] == "woven"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_an_empty_folder_and_a_stages_own_are_replaced_even_where_files_are_missing(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    weave(tmp_path / "out", "deep/cloth", "thread")
    (tmp_path / "out" / "thread").unlink()
    weave(tmp_path / "out", "yarn")
    assert set(content(tmp_path / "out")) == {"yarn", CLAIM_FILE}
    claim = read_claim(tmp_path / "out")
    assert claim is not None
    assert (claim.stage, claim.entries) == (STAGE, {"yarn", CLAIM_FILE})


def test_links_are_followed_and_stay(tmp_path: Path) -> None:
    real = weave(tmp_path / "disk" / "real")
    (tmp_path / "link").symlink_to(real)
    weave(tmp_path / "link", "new")
    weave(tmp_path / "disk" / ".." / "link", "newer")
    assert (tmp_path / "link").is_symlink()
    assert set(content(real)) == {"newer", CLAIM_FILE}
    assert sorted(path.name for path in (tmp_path / "disk").iterdir()) == ["real"]
    letters(tmp_path / "letters")
    (tmp_path / "other").symlink_to(tmp_path / "letters")
    with pytest.raises(ValueError, match=r"holds letter.txt"):
        weave(tmp_path / "other")


@pytest.mark.parametrize("place", [".", "..", "inner/.."])
def test_the_folder_that_one_is_in_is_not_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str) -> None:
    (tmp_path / "here" / "inner").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "here")
    with pytest.raises(ValueError, match="holds the folder that you are in"):
        check_replaceable(Path(place), STAGE)


def test_a_mount_point_is_not_replaced() -> None:
    with pytest.raises(ValueError, match="is a mount point"):
        check_replaceable(Path("/proc"), STAGE)


def test_an_input_is_not_replaced_even_in_a_folder_of_the_stage(tmp_path: Path) -> None:
    folder = weave(tmp_path / "out")
    for source in (folder, folder / "cloth"):
        with pytest.raises(ValueError, match=r"`draftsmith weave` reads .*out"):
            check_replaceable(folder, STAGE, [source])
    check_replaceable(folder, STAGE, [tmp_path / "out2" / "cloth", folder / "no such file"])


def test_a_claim_takes_names_and_words_that_are_no_unicode(tmp_path: Path) -> None:
    with atomic_directory(tmp_path / "out", STAGE) as folder:
        (folder / os.fsdecode(b"cl\xffth")).write_text("woven")
        provenance.write(folder, {"command": os.fsdecode(b"weave \xff")})
    assert provenance.read(tmp_path / "out")["command"] == "weave \udcff"
    weave(tmp_path / "out")


def test_reports_and_logs_that_a_stage_did_not_begin_are_left_alone(tmp_path: Path) -> None:
    report, log = tmp_path / "report.md", tmp_path / "log.jsonl"
    for missing in (lambda: check_unclaimed(tmp_path, ["report.md"]), lambda: check_begun(log, "part", "head")):
        missing()
    report.write_text("mine")
    with pytest.raises(ValueError, match=r"report.md is there without provenance.json"):
        check_unclaimed(tmp_path, ["report.md"])
    provenance.write(tmp_path, {})
    check_unclaimed(tmp_path, ["report.md"])
    for own in ('{"part": 3}\n', '{"head": "x"}\n{"part": 1}', '{"pa', ""):
        log.write_text(own)
        check_begun(log, "part", "head")
    for foreign in ('{"text": "mine"}\n', '{"partner": 1}\n', "a torn note", "{\n"):
        log.write_text(foreign)
        with pytest.raises(ValueError, match=r"log.jsonl was not written by this command"):
            check_begun(log, "part", "head")


def test_a_record_is_not_overwritten_by_a_stage_that_only_adds_files(tmp_path: Path) -> None:
    check_unclaimed(tmp_path)
    with pytest.raises(ValueError, match=r"`draftsmith weave` wrote .*out, record included"):
        check_unclaimed(weave(tmp_path / "out"))


@pytest.mark.parametrize("name", ["letters/letter.txt", "letters", "link", "woven/cloth", "woven/provenance.json"])
def test_an_output_file_replaces_no_input_and_nothing_that_a_stage_wrote(tmp_path: Path, name: str) -> None:
    letters(tmp_path / "letters")
    weave(tmp_path / "woven")
    (tmp_path / "link").symlink_to(tmp_path / "letters" / "letter.txt")
    with pytest.raises(ValueError, match=r"name (another file|a file inside it)"):
        check_output_file(tmp_path / name, [tmp_path / "letters"])


def test_an_output_file_may_be_new_beside_the_inputs_or_replace_another_file(tmp_path: Path) -> None:
    letters(tmp_path / "letters")
    check_output_file(tmp_path / "letters" / "letter.txt", [tmp_path / "absent"])
    check_output_file(tmp_path / "letters" / "report.json", [tmp_path / "letters"])


def test_what_a_writer_killed_between_two_renames_had_moved_aside_is_put_back(tmp_path: Path) -> None:
    program = f"""
import os, pathlib
from draftsmith import files
folder = pathlib.Path({str(tmp_path / "out")!r})
with files.atomic_directory(folder, {STAGE!r}) as partial:
    (partial / "cloth").write_text("woven")
rename = os.replace
os.replace = lambda old, new: os._exit(9) if ".out.partial" in str(old) and str(new) == str(folder) else rename(old, new)
with files.atomic_directory(folder, {STAGE!r}) as partial:
    (partial / "cloth").write_text("new")
"""
    assert subprocess.run([sys.executable, "-c", program], timeout=60, check=False).returncode == 9
    assert not (tmp_path / "out").exists()
    with pytest.raises(KeyError), atomic_directory(tmp_path / "out", STAGE):
        raise KeyError
    assert content(tmp_path / "out")["cloth"] == "woven"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_data_prompts_deletes_neither_its_source_nor_what_lies_beside_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    home = tmp_path / "home"
    home.mkdir()
    source = home / "prompts.jsonl"
    source.write_text("".join(json.dumps({"prompt": f"question {number}"}) + "\n" for number in range(4)))
    monkeypatch.chdir(home)
    os.symlink(home, tmp_path / "link")
    for out in (home, Path("."), Path("../home"), tmp_path / "link", tmp_path):
        assert main(["data", "prompts", "--source", str(source), "--out", str(out)]) == 1
        error = capsys.readouterr().err
        assert "name another" in error
        assert "Traceback" not in error
    assert [path.name for path in home.iterdir()] == ["prompts.jsonl"]
    for _ in range(2):
        assert main(["data", "prompts", "--source", str(source), "--out", "new"]) == 0
    assert main(["data", "prompts", "--source", "new/prompts.jsonl", "--out", "new"]) == 1
    assert "reads new/prompts.jsonl, and would delete it" in capsys.readouterr().err
