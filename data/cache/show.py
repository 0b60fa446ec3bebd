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
from draftsmith.data.chat_template import chat_of
from draftsmith.data.chats.modes import MODES
from draftsmith.data.chats.token_kinds import EVERYTHING, KindCounts, TrainedOn
from draftsmith.data.chats.tokenized_samples import TokenizedSample
from draftsmith.data.corpus import Corpus
from draftsmith.data.shards.manifest import MANIFEST_FILE, Manifest
from draftsmith.escapes import visible
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
    trained_on: Annotated[TrainedOn, FLAT] = EVERYTHING,
) -> None:
    """Prints samples with the tokens that are not trained on dimmed, and counts those that are trained on.

    The counts tell replies, tool calls and thoughts apart. Where the output is no terminal, the tokens that are trained on are between
    « and ».

    Args:
        source: A hidden-state cache, a folder of replies, or a JSONL file of conversations.
        target: Path or hub id of the target, for its tokenizer; default, for a cache: the one it names.
        index: First sample to show; a row that training drops counts, and the reason is shown.
        count: How many samples to show.
        tokens: Show where one token ends and the next begins.
        split: Show samples of this split only (not for a cache, which holds one).
        where: How the target's files are read; see `TokenizerOptions`.
        rendering: The chat template; see `TemplateChoice`.
        trained_on: What of the assistant's turns is trained on (not for a cache, which says so); see `TrainedOn`.

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
    console = Console()
    if is_cache:
        if trained_on != EVERYTHING:
            raise ValueError(f"{source} is a cache, which says what is trained on; leave the options for that out")
        samples: Iterator[TokenizedSample | Dropped] = _cached(source, index, count)
        _print_kinds(console, Manifest.load(source))
    else:
        revision, trust = where.revision, where.trust_remote_code
        chat = partial(chat_of, name, tokenizer, rendering.template, revision, trust, rendering.options)
        corpus = Corpus(source, chat, split, _NO_LIMIT, trained_on=trained_on)
        samples = itertools.islice(corpus.read(), index, index + count)
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
    counts = sample.counts
    kinds = f": {counts.words}" if counts.read or counts.trained.keys() - {"replies"} else ""
    text = Text(f"{visible(sample.id)}: {total} tokens, {labelled} trained on ({share}){kinds}\n", style="bold")
    for kept, ids in _runs(sample.input_ids, sample.loss_mask):
        piece = "│".join(str(tokenizer.decode([token])) for token in ids) if tokens else str(tokenizer.decode(ids))
        text.append(
            f"«{visible(piece)}»" if marks and kept else visible(piece),
            style="not bold green" if kept else "not bold dim",
        )
        if tokens:
            text.append("│", style="not bold dim")
    return text.append("\n")


def _print_kinds(console: Console, manifest: Manifest) -> None:
    """The counts of a whole cache, where it has more than replies."""
    if manifest.read_tokens or manifest.trained_tokens.keys() - {"replies"}:
        console.print(Text(assistant_tokens(manifest) + "\n"), soft_wrap=True)


def assistant_tokens(manifest: Manifest) -> str:
    """Say how many of a cache's tokens are of each kind, and in which modes they are.

    Args:
        manifest: of the cache.

    Returns:
        One line, such as `the assistant's tokens: replies 12, thoughts 9 (read only); trained on by mode: thinking 12`.
    """
    if not manifest.trained_tokens:
        count = f"the assistant's tokens: {manifest.num_labelled:,} trained on"
        return f"{count}; this cache does not tell replies, tool calls and thoughts apart"
    kinds = KindCounts(manifest.trained_tokens, manifest.read_tokens).words
    modes = ", ".join(f"{name} {manifest.modes[name]:,}" for name in MODES if manifest.modes.get(name))
    return f"the assistant's tokens: {kinds}; trained on by mode: {modes}"


def _runs(ids: Sequence[int], mask: Iterable[bool]) -> Iterator[tuple[bool, list[int]]]:
    """Stretches of equal mask. They are decoded whole: one character may be several byte-level tokens."""
    for kept, group in itertools.groupby(zip(mask, ids, strict=True), key=lambda pair: pair[0]):
        yield kept, [token for _, token in group]


def _cached(source: Path, index: int, count: int) -> Iterator[TokenizedSample]:
    cache = HiddenStateCache(source, check="lazy")
    for number in range(index, min(index + count, len(cache))):
        sample = cache[number]
        yield TokenizedSample(sample.id, sample.input_ids.tolist(), sample.loss_mask.tolist())
