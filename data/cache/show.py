"""Prints samples the way training sees them: what is masked is dimmed.

Owns: this view. Does not know: how samples are made.
"""

import itertools
from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Annotated

from rich.console import Console
from rich.text import Text
from transformers import PreTrainedTokenizerBase

from draftsmith.arguments import FLAT
from draftsmith.data.cache.reader import HiddenStateCache
from draftsmith.data.corpus import Corpus
from draftsmith.data.shards.manifest import MANIFEST_FILE, Manifest
from draftsmith.data.tokens import TokenizedSample, chat_of
from draftsmith.foreign import visible
from draftsmith.json_rows import Dropped, summary
from draftsmith.models.target.options import OWN_FILES, TokenizerOptions
from draftsmith.models.target.prompt_template import OWN_TEMPLATE, TemplateChoice

_NO_LIMIT = 2**31


def show(
    source: Path,
    target: str | None = None,
    index: int = 0,
    count: int = 1,
    tokens: bool = False,
    split: str | None = None,
    where: Annotated[TokenizerOptions, FLAT] = OWN_FILES,
    rendering: Annotated[TemplateChoice, FLAT] = OWN_TEMPLATE,
) -> None:
    """Prints samples with the tokens that are not trained on dimmed, and the share that is trained on.

    Where the output is no terminal, the tokens that are trained on are between « and ».

    Args:
        source: A hidden-state cache, a folder of replies, or a JSONL file of conversations.
        target: Path or hub id of the target, for its tokenizer; default, for a cache: the one it names.
        index: First sample to show; a row that training drops counts, and the reason is shown.
        count: How many samples to show.
        tokens: Show where one token ends and the next begins.
        split: Show samples of this split only (not for a cache, which holds one).
        where: How the target's files are read; see `TokenizerOptions`.
        rendering: The chat template; see `TemplateChoice`.

    Raises:
        ValueError: the numbers are out of range, nothing names the tokenizer, or there is no such sample.
    """
    if index < 0 or count < 1:
        raise ValueError(f"index {index} and count {count}: samples count from 0, and at least one is shown")
    is_cache = (source / MANIFEST_FILE).exists()
    if target is None and not is_cache:
        raise ValueError(f"{source} does not name its tokenizer; give the target with --target")
    name = target or Manifest.load(source).identity.target
    tokenizer = where.tokenizer(name)
    if is_cache:
        samples: Iterator[TokenizedSample | Dropped] = _cached(source, index, count)
    else:
        revision, trust = where.revision, where.trust_remote_code
        chat = partial(chat_of, name, tokenizer, rendering.template, revision, trust, rendering.options)
        corpus = Corpus(source, chat, split, _NO_LIMIT)
        samples = itertools.islice(corpus.read(), index, index + count)
    console = Console()
    dropped: list[Dropped] = []
    shown = 0
    for sample in samples:
        if isinstance(sample, Dropped):
            dropped.append(sample)
            console.print(Text(f"{sample.place} is dropped: {sample.reason}\n"), soft_wrap=True)
            continue
        console.print(render(sample, tokenizer, tokens, marks=not console.is_terminal), soft_wrap=True)
        shown += 1
    if shown == 0:
        raise ValueError(f"{source} has no sample {index}" + (f": {summary(dropped)}" if dropped else ""))


def render(
    sample: TokenizedSample, tokenizer: PreTrainedTokenizerBase, tokens: bool = False, marks: bool = False
) -> Text:
    """Style one sample: a title line, then its text with masked parts dimmed.

    Args:
        sample: in tokens.
        tokenizer: that they are of.
        tokens: put a thin bar between tokens.
        marks: put « » around what is trained on.

    Returns:
        The text.
    """
    total, labelled = len(sample.input_ids), sample.num_labelled
    share = f"{labelled / total:.0%}" if total else "none"
    text = Text(f"{visible(sample.id)}: {total} tokens, {labelled} trained on ({share})\n", style="bold")
    for kept, ids in _runs(sample.input_ids, sample.loss_mask):
        piece = "│".join(str(tokenizer.decode([token])) for token in ids) if tokens else str(tokenizer.decode(ids))
        text.append(
            f"«{visible(piece)}»" if marks and kept else visible(piece),
            style="not bold green" if kept else "not bold dim",
        )
        if tokens:
            text.append("│", style="not bold dim")
    return text.append("\n")


def _runs(ids: Sequence[int], mask: Iterable[bool]) -> Iterator[tuple[bool, list[int]]]:
    """Stretches of equal mask. They are decoded whole: one character may be several byte-level tokens."""
    for kept, group in itertools.groupby(zip(mask, ids, strict=True), key=lambda pair: pair[0]):
        yield kept, [token for _, token in group]


def _cached(source: Path, index: int, count: int) -> Iterator[TokenizedSample]:
    cache = HiddenStateCache(source, check="lazy")
    for number in range(index, min(index + count, len(cache))):
        sample = cache[number]
        yield TokenizedSample(sample.id, sample.input_ids.tolist(), sample.loss_mask.tolist())
