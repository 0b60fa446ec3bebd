"""The way from a typed function to its command line, mistakes included."""

import dataclasses
from pathlib import Path
from typing import Annotated, Any, Literal

import pytest

from draftsmith.arguments import FLAT, WHOLE, CommandParser, call, explain, gather_lists, parser_for, suggestion


@dataclasses.dataclass(frozen=True)
class Shape:
    """A shape.

    Args:
        beam_width: How many beams.
        draft_length: How many tokens.
    """

    beam_width: int = 1
    draft_length: int = 4


@dataclasses.dataclass(frozen=True)
class Oven:
    """An oven.

    Args:
        fuel: What burns.
        racks: How many.
    """

    fuel: str = "wood"
    racks: int = 2


def bake(
    out: Path,
    flour: list[Path],
    shape: Shape = Shape(),
    heats: tuple[float, ...] = (0.0,),
    max_new_loaves: int = 3,
    kind: Literal["rye", "wheat"] = "rye",
    note: str | None = None,
    oven: Annotated[Oven, FLAT] = Oven(),
    marks: Annotated[tuple[str, ...], WHOLE] = (),
) -> dict[str, Any]:
    """Bakes bread.

    At length.

    Args:
        out: Where the bread goes.
        flour: Where the flour is.
        shape: How it is drafted.
        heats: Every heat to try.
        max_new_loaves: The most loaves.
        kind: The grain.
        note: What to write on it.
        oven: The oven.
        marks: What to cut into it.
    """
    return dict(locals())


def baked(*words: str) -> dict[str, Any]:
    result: dict[str, Any] = call(bake, "draftsmith bake", ["--out", "o", "--flour", "f", *words])
    return result


def refused(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    with pytest.raises(SystemExit) as stopped:
        call(bake, "draftsmith bake", list(words))
    assert stopped.value.code == 2
    return capsys.readouterr().err


def test_options_reach_the_function_as_its_own_types() -> None:
    got = baked("--shape.beam_width", "2", "--heats", "0", "0.7", "--kind=wheat", "--note", "fresh: 12")
    assert got == {
        "out": Path("o"),
        "flour": [Path("f")],
        "shape": Shape(beam_width=2),
        "heats": (0.0, 0.7),
        "max_new_loaves": 3,
        "kind": "wheat",
        "note": "fresh: 12",
        "oven": Oven(),
        "marks": (),
    }


def test_a_flat_dataclass_has_options_keys_and_help_without_its_name(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = tmp_path / "c.yaml"
    config.write_text("fuel: gas\n")
    assert baked("--config", str(config), "--racks", "5")["oven"] == Oven("gas", 5)
    text = parser_for(bake, "draftsmith bake").format_help()
    assert "--racks RACKS" in text
    assert "What burns." in text
    assert "--oven" not in text
    assert "Did you mean --racks?" in refused(capsys, "--rack", "1", "--out", "o", "--flour", "f")


def test_dashes_and_underscores_name_the_same_option() -> None:
    assert baked("--max-new-loaves", "8")["max_new_loaves"] == 8
    assert baked("--max_new_loaves=8")["max_new_loaves"] == 8


@pytest.mark.parametrize(
    "words",
    [
        ["--flour", "f", "g"],
        ["--flour", "f", "--flour=g"],
        ["--flour", '["f", "g"]'],
        ["--flour=[f, g]"],
        ["--flour", "f,g"],
        ["--flour=f, g"],
    ],
)
def test_a_list_option_takes_several_words_repeats_commas_and_json(words: list[str]) -> None:
    assert call(bake, "draftsmith bake", ["--out", "o", *words])["flour"] == [Path("f"), Path("g")]


def test_numbers_in_a_list_are_read_by_its_type() -> None:
    assert baked("--heats", "0,0.7", "1e2")["heats"] == (0.0, 0.7, 100.0)


def test_only_json_keeps_a_comma_in_a_value() -> None:
    assert baked("--flour", '["a,b"]')["flour"] == [Path("f"), Path("a,b")]


@pytest.mark.parametrize(
    ("words", "marks"),
    [
        (["--marks", "a,b", "[END]", "null"], ("a,b", "[END]", "null")),
        (["--marks", '["a,b", "c"]', "d"], ("a,b", "c", "d")),
        (["--marks=[1]"], ("[1]",)),
        (["--marks", "null"], ("null",)),
        (["--marks", ""], ("",)),
    ],
)
def test_commas_and_brackets_belong_to_the_values_of_a_whole_list(words: list[str], marks: tuple[str, ...]) -> None:
    assert baked(*words)["marks"] == marks


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--heats"], "option --heats has no value; give several as --heats A B, as --heats A,B or as a JSON list"),
        (["--heats", "--note", "x"], "option --heats has no value"),
        (["--heats", "1,,2"], "option --heats: '1,,2' holds an empty value"),
        (["--heats", "1,"], "holds an empty value"),
        (["--heats", "[[1]]"], "an inner list"),
        (["--heats", "warm,hot"], "warm"),
        (["--marks"], "option --marks has no value; give several as --marks A B or as a JSON list; a comma belongs to"),
    ],
)
def test_a_list_that_cannot_be_read_is_answered_with_how_to_write_it(
    capsys: pytest.CaptureFixture[str], words: list[str], message: str
) -> None:
    assert message in refused(capsys, "--out", "o", "--flour", "f", *words)


def test_a_text_where_yaml_needs_a_list_is_answered_with_how_to_write_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "c.yaml").write_text("heats: 0,1\n")
    assert "A list in YAML is [a, b]" in refused(
        capsys, "--config", str(tmp_path / "c.yaml"), "--out", "o", "--flour", "f"
    )


def test_help_says_how_a_list_is_written() -> None:
    text = " ".join(parser_for(bake, "draftsmith bake").format_help().split())
    assert (
        "--heats HEATS[,...] Every heat to try. Give several as --heats A B, as --heats A,B or as a JSON list." in text
    )
    assert (
        "--marks MARKS ... What to cut into it. Give several as --marks A B or as a JSON list; a comma belongs" in text
    )
    assert "whole" not in text


def test_lists_are_gathered_behind_the_other_words() -> None:
    words = ["--a", "1", "--n", "1", "2", "--b=x", "--n", "3", "--t", "1"]
    assert gather_lists(words, {"n": False, "t": True}) == ["--a", "1", "--b=x", "--n=[1, 2, 3]", '--t=["1"]']


def test_a_config_file_sets_options_and_words_after_it_win(tmp_path: Path) -> None:
    config = tmp_path / "c.yaml"
    config.write_text("max_new_loaves: 5\nshape:\n  beam_width: 7\n")
    got = baked("--config", str(config), "--shape.draft_length", "2", "--max_new_loaves", "6")
    assert (got["max_new_loaves"], got["shape"]) == (6, Shape(7, 2))


def test_a_printed_config_is_read_back(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        baked("--heats", "1.0", "--print_config")
    config = tmp_path / "c.yaml"
    config.write_text(capsys.readouterr().out)
    assert call(bake, "draftsmith bake", ["--config", str(config)])["heats"] == (1.0,)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--max-new-loave", "1"], "unknown option --max_new_loave. Did you mean --max_new_loaves?"),
        (["--shape.beam_widht", "1"], "unknown option --shape.beam_widht. Did you mean --shape.beam_width?"),
        (["--beam_width", "1"], "unknown option --beam_width. Did you mean --shape.beam_width?"),
        (["--zzz", "1"], "unknown option --zzz.\n"),
        (["stray"], "unknown option stray."),
        (["--kind", "oats"], "oats"),
        (["--config", "missing.yaml"], "File does not exist"),
    ],
)
def test_a_mistyped_option_is_answered_with_the_nearest_one(
    capsys: pytest.CaptureFixture[str], words: list[str], message: str
) -> None:
    assert message in refused(capsys, *words, "--out", "o", "--flour", "f")


@pytest.mark.parametrize(
    ("yaml", "hint"),
    [
        ("max_new_loavez: 1\n", "Did you mean max_new_loaves?"),
        ("shape:\n  beam_widht: 1\n", "Did you mean shape.beam_width?"),
        ("quite_other: 1\n", "'quite_other' is not accepted (unknown key).\n"),
    ],
)
def test_a_mistyped_key_in_yaml_is_answered_with_the_nearest_one(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], yaml: str, hint: str
) -> None:
    (tmp_path / "c.yaml").write_text(yaml)
    assert hint in refused(capsys, "--config", str(tmp_path / "c.yaml"), "--out", "o", "--flour", "f")


def test_a_mistyped_key_below_a_subcommand_is_answered_by_that_subcommand(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    parser, below = CommandParser(prog="draftsmith"), CommandParser()
    below.add_argument("--config", action="config")
    below.add_argument("--trainer.max_steps", type=int)
    parser.add_subcommands().add_subcommand("fit", below)
    (tmp_path / "c.yaml").write_text("trainer:\n  max_stepz: 1\n")
    with pytest.raises(SystemExit):
        parser.parse_args(["fit", "--config", str(tmp_path / "c.yaml")])
    message = capsys.readouterr().err
    assert "Did you mean trainer.max_steps?" in message
    assert "Run 'draftsmith fit --help'" in message


def test_a_missing_option_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    assert "required: flour" in refused(capsys, "--out", "o")


def test_an_option_is_never_guessed_from_its_beginning(capsys: pytest.CaptureFixture[str]) -> None:
    assert "unknown option --max" in refused(capsys, "--max", "1", "--out", "o", "--flour", "f")


def test_help_holds_the_docstring_and_plain_type_names() -> None:
    text = parser_for(bake, "draftsmith bake").format_help()
    assert "usage: draftsmith bake --out OUT --flour FLOUR [options]" in text
    for words in ("Bakes bread.", "At length.", "The most loaves.", "How many beams.", "default: 3", "type: Path"):
        assert words in text
    assert "<class" not in text
    assert "LIST_OF_PATHS_FILE" not in text


def test_a_suggestion_needs_some_likeness() -> None:
    assert suggestion("extract", ["data extract", "extracts"]) == " Did you mean extracts or data extract?"
    assert suggestion("q", ["data", "train"]) == ""


def test_an_explanation_is_given_once() -> None:
    once = explain("Option 'beam_widht' is not accepted", ["beam_width"])
    assert once == "Option 'beam_widht' is not accepted (unknown key). Did you mean beam_width?"
    assert explain(once, ["beam_width"]) == once


@pytest.mark.parametrize(
    "words",
    [
        ["--ways", "a", "b"],
        ["--ways", "a,b"],
        ["--ways", "a", "--ways", "b"],
        ["--ways", '["a", "b"]'],
        ["--ways=[a, b]"],
    ],
)
def test_a_list_of_given_words_takes_every_form_of_a_list(words: list[str]) -> None:
    def chosen(ways: tuple[Literal["a", "b"], ...] = ("a",)) -> tuple[str, ...]:
        return ways

    assert list(call(chosen, "x", words)) == ["a", "b"]
