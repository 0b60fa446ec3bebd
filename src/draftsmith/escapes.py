"""Text that somebody else wrote (names, replies, prompts, errors), escaped where a reader would take it for markup or commands.

Owns one escape for each place: a terminal, a Markdown cell, code span and block, a line of YAML, a chart, a shell. Knows none of the
pages that use them. For JSON see `json_text`.
"""

from __future__ import annotations

import json
import re
import shlex

# C0 and C1 control characters but line feed and tab, the line separators of Unicode, marks that turn the direction of writing,
# byte-order marks, and halves of surrogate pairs, which no encoder takes.
_UNSEEN = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069\ufeff\ud800-\udfff]")
_MARKUP = re.compile(r"([\\`*\[\]<>&|~#$])|(?<!\w)_|_(?!\w)|(?<=http):(?=//)|(?<=https):(?=//)|(?<=www)\.")


def visible(text: object) -> str:
    """For a terminal: control characters, which could recolour or overwrite it, as `\\x1b`; line feeds and tabs as they are."""
    return _UNSEEN.sub(lambda match: match[0].encode("unicode_escape").decode(), str(text))


def one_line(text: object) -> str:
    """The same without line breaks and tabs, which become spaces."""
    return " ".join(visible(text).split())


def plain(text: object) -> str:
    """For Markdown, a table's cell included: one line in which no character marks anything up, opens a tag or makes a link."""
    return _MARKUP.sub(r"\\\g<0>", one_line(text))


def code(text: object) -> str:
    """For Markdown: a code span, in more backticks than the text has in a row. Not for tables: there a `|` ends the cell."""
    inside = one_line(text)
    ticks = "`" * (_longest_run(inside) + 1)
    space = " " if not inside or inside[0] == "`" or inside[-1] == "`" else ""
    return f"{ticks}{space}{inside}{space}{ticks}"


def block(text: object, language: str = "") -> str:
    """For Markdown: a code block, fenced by more backticks than the text has in a row."""
    inside = visible(text)
    fence = "`" * max(3, _longest_run(inside) + 1)
    return f"{fence}{language}\n{inside}\n{fence}"


def yaml_text(text: object) -> str:
    """For one line of YAML: a quoted string."""
    return json.dumps(one_line(text), ensure_ascii=False)


def chart_text(text: object) -> str:
    """For a label of Matplotlib, which reads formulas between dollar signs and leaves labels that begin with `_` out of legends."""
    label = one_line(text).replace("$", r"\$")
    return f" {label}" if label.startswith("_") else label


def shell_word(text: object) -> str:
    """For a command to paste: one word of a shell."""
    return shlex.quote(one_line(text))


def _longest_run(text: str) -> int:
    return max(map(len, re.findall("`+", text)), default=0)
