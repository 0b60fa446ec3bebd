"""From the target's replies to an n-gram table that scores drafts a second time.

Owns the command. How n-grams are counted and smoothed is in :mod:`draftsmith.models.ngrams.kneser_ney`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from draftsmith.arguments import FLAT
from draftsmith.data.chats.token_kinds import EVERYTHING, TrainedOn
from draftsmith.data.replies.reply_text import replies_of
from draftsmith.json_rows import Dropped, summary
from draftsmith.models.ngrams.kneser_ney import kneser_ney
from draftsmith.models.ngrams.table import NgramTable
from draftsmith.models.target.options import OWN_FILES, TokenizerOptions
from draftsmith.models.target.prompt_template import OWN_TEMPLATE, TemplateChoice
from draftsmith.ownership import check_replaceable

STAGE = "draftsmith data ngrams"


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
    replies.write(table, out, STAGE, settings)
    print(f"{_sizes(table)} in {out}, from {sum(map(len, runs)):,} tokens; {summary(dropped)}")


def _sizes(table: NgramTable) -> str:
    counts = table.orders_C[1:].bincount(minlength=table.order + 1).tolist()[1:]
    return " and ".join(f"{count:,} {n}-grams" for n, count in enumerate(counts, start=1))
