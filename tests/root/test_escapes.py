"""Text of others stays text wherever it is printed."""

import re
from io import StringIO

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from draftsmith import cli
from draftsmith.escapes import block, chart_text, code, one_line, plain, visible, yaml_text

HOSTILE = "a|b `c` [red]x[/red] <img src=x> $\\alpha$ \x1b[2J\u202e\ud800 https://evil.example\n# d"
TEXTS = st.one_of(st.text(), st.text(alphabet="`|[]<>$_*\\\n\x1b\u202e\ud800ab:/."), st.just(HOSTILE))


@given(TEXTS)
def test_a_terminal_gets_no_control_character(text: str) -> None:
    shown = visible(text)
    assert not re.search("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]", shown)
    shown.encode("utf-8")


@pytest.mark.parametrize("text", ["plain words", "größe 2 + 4", "שלום", "👩‍🔬 \t tab\nline"])
def test_ordinary_text_of_any_script_is_shown_as_it_is(text: str) -> None:
    assert visible(text) == text


@given(TEXTS)
def test_a_table_keeps_its_columns(text: str) -> None:
    line = f"| {plain(text)} | 1 |"
    assert len(re.findall(r"(?<!\\)(?:\\\\)*\|", line)) == 3
    assert "\n" not in line


@given(TEXTS)
def test_markdown_reads_no_markup_in_plain_text(text: str) -> None:
    bare = re.sub(r"\\[!-/:-@\[-`{-~]", "", plain(text))  # without escaped punctuation
    assert not re.search(r"[`*\[\]<>&|$~#]|https?://|www\.", bare)


@given(TEXTS)
def test_a_code_span_and_a_block_end_where_they_are_closed(text: str) -> None:
    span = code(text)
    ticks = re.match("`+", span)
    assert ticks is not None
    assert re.findall("`+", span).count(ticks[0]) == 2
    fenced = block(text, "sh")
    fence = re.match("`+", fenced)
    assert fence is not None
    assert len(re.findall(f"{fence[0]}", fenced)) == 2


@given(TEXTS)
def test_yaml_gives_the_text_back(text: str) -> None:
    assert yaml.safe_load(f"base_model: {yaml_text(text)}") == {"base_model": one_line(text)}


@pytest.mark.parametrize("text", [HOSTILE, "$x", "_hidden", "a $ b $ c", r"\frac{$}{$"])
def test_a_chart_draws_any_name_and_has_it_in_its_legend(text: str) -> None:
    figure = Figure()
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    axes.plot([0, 1], label=chart_text(text))
    assert len(axes.get_legend_handles_labels()[1]) == 1
    axes.legend()
    figure.suptitle(chart_text(text))
    figure.canvas.draw()


def test_an_error_that_quotes_a_file_cannot_recolour_the_terminal(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["data", "show", "--source", "\x1b[31mred"]) == 1
    assert "\x1b" not in capsys.readouterr().err
    monkeypatch.setattr("sys.stderr", told := StringIO())
    with pytest.raises(SystemExit):
        cli.main(["data", "show", "--sou\x1brce", "x"])
    assert "\\x1brce" in told.getvalue()
    assert "\x1b" not in told.getvalue()
