"""From the target's replies to an n-gram table that scores drafts a second time.

Owns the command, and what of a source a table of text reads. How n-grams are counted and smoothed is in
:mod:`draftsmith.models.ngrams.kneser_ney`.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated

from draftsmith import provenance
from draftsmith.arguments import FLAT
from draftsmith.data.chats.trained import EVERYTHING, TrainedOn
from draftsmith.data.corpus import Corpus
from draftsmith.data.tokens import chat_of
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


@dataclass(frozen=True)
class Replies:
    """The replies of a source, in a target's token ids.

    Attributes:
        corpus: reads them.
        vocab_size: of the target.
        tokenizer_fingerprint: of its tokenizer.
    """

    corpus: Corpus
    vocab_size: int
    tokenizer_fingerprint: str

    def runs(self, before: int, dropped: list[Dropped]) -> Iterator[list[int]]:
        """What the assistant wrote, a stretch at a time.

        Args:
            before: how many tokens before each stretch come with it, where there are so many.
            dropped: takes the rows that cannot be read.

        Yields:
            Token ids.
        """
        for sample in self.corpus.all_samples(dropped):
            place = 0
            for labelled, group in itertools.groupby(sample.loss_mask):
                end = place + sum(1 for _ in group)
                if labelled:
                    yield list(sample.input_ids[max(0, place - before) : end])
                place = end


def replies_of(
    source: Path,
    target: str,
    split: str | None,
    where: TokenizerOptions,
    rendering: TemplateChoice,
    trained_on: TrainedOn,
) -> Replies:
    """Open the replies of a source.

    Args:
        source: a folder of replies, or a JSONL file of conversations.
        target: path or hub id of the target.
        split: read samples of this split only.
        where: how the target's files are read.
        rendering: the chat template.
        trained_on: what of the assistant's turns is read.

    Returns:
        The replies.

    Raises:
        ValueError: there is no such source, or its token ids are of another tokenizer.
    """
    tokenizer = where.tokenizer(target)
    config = read_config(resolve(target, where.revision), where.trust_remote_code).get_text_config()
    chat = partial(
        chat_of, target, tokenizer, rendering.template, where.revision, where.trust_remote_code, rendering.options
    )
    corpus = Corpus(source, chat, split, _NO_LIMIT, int(config.vocab_size), trained_on)
    fingerprint = tokenizer_fingerprint(tokenizer)
    corpus.check_tokenizer(fingerprint)
    return Replies(corpus, int(config.vocab_size), fingerprint)


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
    replies = replies_of(source, target, split, where, rendering, trained_on)
    dropped: list[Dropped] = []
    runs = list(replies.runs(order - 1, dropped))
    table = kneser_ney(runs, replies.vocab_size, order, least_count, replies.tokenizer_fingerprint)
    settings = {"order": order, "least_count": least_count, "split": split, "template": rendering.template}
    with atomic_directory(out, STAGE) as partial_folder:
        table.save(partial_folder)
        record = provenance.record(provenance.command_line(), settings, {str(source): replies.corpus.fingerprint})
        provenance.write(partial_folder, record)
    print(f"{_sizes(table)} in {out}, from {sum(map(len, runs)):,} tokens; {summary(dropped)}")


def _sizes(table: NgramTable) -> str:
    counts = table.orders_C[1:].bincount(minlength=table.order + 1).tolist()[1:]
    return " and ".join(f"{count:,} {n}-grams" for n, count in enumerate(counts, start=1))
