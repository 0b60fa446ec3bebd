"""What the assistant wrote in a target's replies, as tables of text read it, and the folder of such a table.

Owns what of a source is read. Does not know what is made of it, or which commands make it.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Protocol

from draftsmith import provenance
from draftsmith.data.chat_template import chat_of
from draftsmith.data.chats.token_kinds import TrainedOn
from draftsmith.data.corpus import Corpus
from draftsmith.files import atomic_directory
from draftsmith.json_rows import Dropped
from draftsmith.models.files.fingerprint import tokenizer_fingerprint
from draftsmith.models.files.model_folder import resolve
from draftsmith.models.files.pretrained import read_config
from draftsmith.models.target.options import TokenizerOptions
from draftsmith.models.target.prompt_template import TemplateChoice

_NO_LIMIT = 2**31


class Saved(Protocol):
    """What is made of replies."""

    def save(self, folder: Path) -> None:
        """Write it into a folder that is there."""


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

    def write(self, made: Saved, out: Path, stage: str, settings: Mapping[str, Any]) -> None:
        """Write what was made of them as a folder with its provenance.

        Args:
            made: of these replies.
            out: the folder; an earlier result of the command is replaced.
            stage: the command.
            settings: of the command, for the provenance.
        """
        with atomic_directory(out, stage) as partial_folder:
            made.save(partial_folder)
            inputs = {str(self.corpus.source): self.corpus.fingerprint}
            provenance.write(partial_folder, provenance.record(provenance.command_line(), settings, inputs))


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
