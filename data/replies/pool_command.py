"""From the target's replies to a shared pool, whose text drafts without training may repeat to every request.

Owns the command. What a pool is and how it is kept is in :mod:`draftsmith.models.composed.shared_pool`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Annotated

from draftsmith.arguments import FLAT
from draftsmith.data.chats.token_kinds import EVERYTHING, TrainedOn
from draftsmith.data.replies.reply_text import replies_of
from draftsmith.json_rows import Dropped, summary
from draftsmith.models.composed.shared_pool import SharedPool, check_num_slots
from draftsmith.models.target.options import OWN_FILES, TokenizerOptions
from draftsmith.models.target.prompt_template import OWN_TEMPLATE, TemplateChoice
from draftsmith.ownership import check_replaceable

STAGE = "draftsmith data pool"


def pool(
    source: Path,
    target: str,
    out: Path,
    tokens: int = 2**14,
    split: str | None = None,
    where: Annotated[TokenizerOptions, FLAT] = OWN_FILES,
    rendering: Annotated[TemplateChoice, FLAT] = OWN_TEMPLATE,
    trained_on: Annotated[TrainedOn, FLAT] = EVERYTHING,
) -> None:
    """Keeps text of earlier replies in a pool that drafts without training are looked up in.

    Keeps what the assistant wrote, and nothing of the prompts. The config of a drafter without training can name the pool as
    `shared_pool`. Then every request is drafted from it as well, so that drafts and the time of a reply show one user's text to another.
    Replies never change. What the options below call trained on is what this command keeps.

    Args:
        source: A folder of replies, or a JSONL file of conversations.
        target: Path or hub id of the target, for its tokenizer and vocabulary.
        out: The folder to write; an earlier result of this command there is replaced as a whole, nothing else is.
        tokens: Keep so many tokens, from 2 to 131072, those at the end of the source. Every cycle of decoding reads all of them.
        split: Keep samples of this split only.
        where: How the target's files are read; see `TokenizerOptions`.
        rendering: The chat template; see `TemplateChoice`.
        trained_on: What of the assistant's turns is kept; see `TrainedOn`.

    Raises:
        ValueError: an option is out of range, there are no replies, or the folder holds something else.
    """
    check_num_slots(tokens)
    check_replaceable(out, STAGE, [source])
    replies = replies_of(source, target, split, where, rendering, trained_on)
    dropped: list[Dropped] = []
    sizes = Counter[str]()
    kept = SharedPool.of(
        _counted(replies.runs(0, dropped), sizes), replies.vocab_size, tokens, replies.tokenizer_fingerprint
    )
    settings = {"tokens": tokens, "split": split, "template": rendering.template}
    replies.write(kept, out, STAGE, settings)
    print(f"{kept.num_tokens:,} of {sizes['tokens']:,} tokens in {out}; {summary(dropped)}")


def _counted(runs: Iterable[list[int]], sizes: Counter[str]) -> Iterator[list[int]]:
    """The runs one by one: a corpus has far more tokens than a pool keeps."""
    for run in runs:
        sizes["tokens"] += len(run)
        yield run
