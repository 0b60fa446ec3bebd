"""The prompts of an evaluation as token ids.

Owns which rows count as prompts and which are too long. Does not know what decodes them.
"""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from draftsmith.data.prompt_ids import chat_for, first_prompt_ids
from draftsmith.data.prompts import PROMPT_FILE, read_prompts
from draftsmith.evaluate.records import Sample
from draftsmith.files import read_jsonl
from draftsmith.models.prompt_template import NO_OPTIONS, TemplateOptions


def read_samples(
    path: Path,
    tokenizer: PreTrainedTokenizerBase,
    template: str | None = None,
    split: str | None = None,
    limit: int | None = None,
    eos_ids: Iterable[int] = (),
    options: TemplateOptions = NO_OPTIONS,
) -> list[Sample]:
    """Prompts of a file that `draftsmith data prompts` wrote, or of JSONL rows that carry `prompt_ids` themselves.

    A prompt is what `draftsmith data respond` asks. Rows with ids are taken as they are: what the target read when it made its
    replies. `limit` keeps the first so many, `eos_ids` end a reply, `options` are the chat template's.

    Raises ValueError for a missing or malformed file and for a template that is missing or fails.
    """
    file = path / PROMPT_FILE if path.is_dir() else path
    _, first = next(iter(read_jsonl(file)))
    if "prompt_ids" in first or "turns" in first:
        if options != NO_OPTIONS:
            raise ValueError(
                f"{file} has token ids, which no template renders; leave template_name and template_args out"
            )
        return [_from_ids(f"{file}:{line}", line, row) for line, row in read_jsonl(file)][:limit]
    prompts = read_prompts(file, split)[:limit]
    chat = chat_for(prompts, tokenizer, template, eos_ids, options)
    return [Sample(prompt.id, prompt.source, tuple(first_prompt_ids(prompt, chat))) for prompt in prompts]


def _from_ids(place: str, line: int, row: Mapping[str, Any]) -> Sample:
    turns = row.get("turns")
    ids = turns[0].get("prompt_ids") if isinstance(turns, list) and turns else row.get("prompt_ids")
    if not isinstance(ids, list) or not ids or not all(isinstance(token, int) for token in ids):
        raise ValueError(
            f"{place}: prompt_ids must be a list of token ids; make the file with `draftsmith data respond`"
        )
    return Sample(str(row.get("id", f"line-{line}")), str(row.get("source", row.get("kind", "prompts"))), tuple(ids))


def within_context(samples: list[Sample], longest: int | None) -> tuple[list[Sample], list[Sample]]:
    """Samples that leave room for at least one new token in a context of `longest` tokens, and those that do not.

    Raises ValueError when none is left.
    """
    fitting = [sample for sample in samples if longest is None or len(sample.prompt_ids) < longest]
    if not fitting:
        raise ValueError(
            f"none of the {len(samples)} prompts fits the target's context of {longest} tokens; give shorter prompts"
        )
    return fitting, [sample for sample in samples if sample not in fitting]
