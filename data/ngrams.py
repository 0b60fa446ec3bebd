"""From the target's replies to an n-gram table that scores drafts a second time.

Owns the command. How n-grams are counted and smoothed is in :mod:`draftsmith.models.ngrams.kneser_ney`.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Annotated

from draftsmith import provenance
from draftsmith.arguments import FLAT
from draftsmith.data.chats.trained import EVERYTHING, TrainedOn
from draftsmith.data.corpus import Corpus
from draftsmith.data.tokens import TokenizedSample, chat_of
from draftsmith.files import atomic_directory
from draftsmith.json_rows import Dropped, summary
from draftsmith.models.files.fingerprint import tokenizer_fingerprint
from draftsmith.models.files.model_folder import resolve
from draftsmith.models.files.pretrained import read_config
from draftsmith.models.ngrams.kneser_ney import kneser_ney
from draftsmith.models.ngrams.table import NgramTable
from draftsmith.models.target.options import OWN_FILES, TokenizerOptions
from draftsmith.models.target.prompt_template import OWN_TEMPLATE, TemplateChoice
from draftsmith.ownership import check_replaceable

STAGE = "draftsmith data ngrams"
_NO_LIMIT = 2**31


def ngrams(
    source: Path,
    target: str,
    out: Path,
    order: int = 3,
    least_count: int = 1,
    split: str | None = None,
    where: Annotated[TokenizerOptions, FLAT] = OWN_FILES,
    rendering: Annotated[TemplateChoice, FLAT] = OWN_TEMPLATE,
    trained_on: Annotated[TrainedOn, FLAT] = EVERYTHING,
) -> None:
    """Counts the n-grams of replies and writes a back-off table (modified Kneser-Ney).

    Counts what the assistant wrote, with up to ORDER - 1 tokens before it. A drafter's config can name the table, which then scores
    the drafter's candidates a second time. What the options below call trained on is what this command counts.

    Args:
        source: A folder of replies, or a JSONL file of conversations.
        target: Path or hub id of the target, for its tokenizer and vocabulary.
        out: The folder to write; an earlier result of this command there is replaced as a whole, nothing else is.
        order: Tokens of the longest n-gram, 1 or more.
        least_count: Leave out n-grams of three and more tokens that occur less often than this; 2 makes tables much smaller.
        split: Count samples of this split only.
        where: How the target's files are read; see `TokenizerOptions`.
        rendering: The chat template; see `TemplateChoice`.
        trained_on: What of the assistant's turns is counted; see `TrainedOn`.

    Raises:
        ValueError: an option is out of range, there are no replies, or the folder holds something else.
    """
    check_replaceable(out, STAGE, [source])
    tokenizer = where.tokenizer(target)
    config = read_config(resolve(target, where.revision), where.trust_remote_code).get_text_config()
    chat = partial(
        chat_of, target, tokenizer, rendering.template, where.revision, where.trust_remote_code, rendering.options
    )
    corpus = Corpus(source, chat, split, _NO_LIMIT, int(config.vocab_size), trained_on)
    own_tokenizer = tokenizer_fingerprint(tokenizer)
    corpus.check_tokenizer(own_tokenizer)
    dropped: list[Dropped] = []
    runs = list(_runs(corpus.all_samples(dropped), order - 1))
    table = kneser_ney(runs, int(config.vocab_size), order, least_count, own_tokenizer)
    settings = {"order": order, "least_count": least_count, "split": split, "template": rendering.template}
    with atomic_directory(out, STAGE) as partial_folder:
        table.save(partial_folder)
        record = provenance.record(provenance.command_line(), settings, {str(source): corpus.fingerprint})
        provenance.write(partial_folder, record)
    print(f"{_sizes(table)} in {out}, from {sum(map(len, runs)):,} tokens; {summary(dropped)}")


def _runs(samples: Iterable[TokenizedSample], before: int) -> Iterator[list[int]]:
    """What the assistant wrote, a stretch at a time, with the tokens before it that its first n-grams need."""
    for sample in samples:
        place = 0
        for labelled, group in itertools.groupby(sample.loss_mask):
            end = place + sum(1 for _ in group)
            if labelled:
                yield list(sample.input_ids[max(0, place - before) : end])
            place = end


def _sizes(table: NgramTable) -> str:
    counts = table.orders_C[1:].bincount(minlength=table.order + 1).tolist()[1:]
    return " and ".join(f"{count:,} {n}-grams" for n, count in enumerate(counts, start=1))
