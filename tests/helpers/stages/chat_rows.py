"""What becomes of one row of a data set: the sample's text with the trained part marked, or the reason why the row is dropped."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from tool_chats import TOOL_TEMPLATE, tool_tokenizer

from draftsmith.data.cache.show import render
from draftsmith.data.chat_template import ChatTemplate
from draftsmith.data.chats.token_kinds import EVERYTHING, TrainedOn
from draftsmith.data.chats.tokenized_samples import TokenizedSample
from draftsmith.data.corpus import Corpus
from draftsmith.json_rows import Dropped
from draftsmith.models.target.prompt_template import NO_OPTIONS, TemplateOptions

WriteRows = Callable[..., Path]
NO = {"role": "assistant", "content": "No."}
RESULT = {"role": "tool", "content": "9 C"}


def outcomes(
    row: dict[str, Any],
    write_jsonl: WriteRows,
    trained_on: TrainedOn = EVERYTHING,
    template: str = TOOL_TEMPLATE,
    options: TemplateOptions = NO_OPTIONS,
) -> list[TokenizedSample | Dropped]:
    tokenizer = tool_tokenizer(template)
    corpus = Corpus(
        write_jsonl([row]), lambda: ChatTemplate(tokenizer, options=options), None, 1000, trained_on=trained_on
    )
    return list(corpus.read())


def text(row: dict[str, Any], write_jsonl: WriteRows, *options: Any) -> str:
    [sample] = outcomes(row, write_jsonl, *options)
    assert isinstance(sample, TokenizedSample), sample
    return render(sample, tool_tokenizer(), marks=True).plain.split("\n", 1)[1].rstrip("\n")


def reason(row: dict[str, Any], write_jsonl: WriteRows, *options: Any) -> str:
    [dropped] = outcomes(row, write_jsonl, *options)
    assert isinstance(dropped, Dropped), dropped
    return dropped.reason
