"""A corpus in token ids on disk: a hidden-state cache without hidden states, for targets that compute them in the loop.

Owns: how a source that `data extract` reads becomes such a folder, once, and when a later run may use it again. Does not know: targets'
weights, batches, training.

It takes five bytes a token instead of the thousands that states take. The reader of caches (`data/cache/reader.py`) reads it. So samples,
their order and the resuming of an epoch work as with a cache.
"""

from __future__ import annotations

import functools
import itertools
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import numpy as np
import torch

from draftsmith import provenance
from draftsmith.data.chat_template import chat_of
from draftsmith.data.chats.token_kinds import EVERYTHING, TrainedOn
from draftsmith.data.chats.tokenized_samples import TokenizedSample, cut, sample_length
from draftsmith.data.corpus import Corpus, why_unlabelled
from draftsmith.data.progress import progress
from draftsmith.data.shards.lengths import write_lengths
from draftsmith.data.shards.manifest import MANIFEST_FILE, CacheIdentity, Manifest
from draftsmith.data.shards.shards import ShardContent, ShardRecord, write_shard
from draftsmith.files import atomic_directory, atomic_write, sha256_file
from draftsmith.json_rows import DROPPED_FILE, Dropped, dropped_lines, summary
from draftsmith.models.files.fingerprint import tokenizer_fingerprint
from draftsmith.models.files.loading import load_tokenizer, target_fingerprint
from draftsmith.models.files.model_folder import resolve
from draftsmith.models.files.pretrained import read_config
from draftsmith.models.target.context import context_of
from draftsmith.models.target.prompt_template import NO_OPTIONS, TemplateOptions, rendering_fingerprint
from draftsmith.ownership import check_replaceable

_SHARD_TOKENS = 2**21
_STAGE = "draftsmith train (tokens)"


@dataclass(frozen=True)
class TextSource:
    """The training text: a source that `draftsmith data extract` takes.

    Attributes:
        source: a folder or JSONL file of replies, conversations or documents.
        split: keep only samples of this split.
        template: Jinja file for conversations, or `none` for plain text; None: the tokenizer's own.
        max_length: samples are cut to this many tokens; None: the target's context.
        rendering: the chat template's name and variables.
        trained_on: what of the assistant's turns is trained on.
    """

    source: Path
    split: str | None = None
    template: str | None = None
    max_length: int | None = None
    rendering: TemplateOptions = NO_OPTIONS
    trained_on: TrainedOn = EVERYTHING


@dataclass(frozen=True)
class TargetFiles:
    """Which target's tokens are meant.

    Attributes:
        name: a model directory, a hub id, or `embedded:target`.
        revision: on the hub.
        adapter: a PEFT adapter on top.
        trust_remote_code: its Python files may run.
        context: most tokens that it reads; None takes it from its config.
    """

    name: str
    revision: str | None = None
    adapter: str | None = None
    trust_remote_code: bool = False
    context: int | None = None


def write_tokens(folder: Path, text: TextSource, target: TargetFiles) -> Path:
    """Makes the folder from the source, or leaves it unchanged if it already holds that text.

    The folder appears whole or not at all. Reads the target's configuration and tokenizer, no weights.

    Args:
        folder: to write.
        text: the source.
        target: whose tokens.

    Returns:
        the folder.

    Raises:
        ValueError: the folder holds other text or another target's; the source cannot be read or has nothing to train on; token ids that
            the target does not have.
    """
    corpus, identity, vocab_size = _corpus_and_identity(text, target)
    if (folder / MANIFEST_FILE).exists():
        _check_same(folder, identity)
        return folder
    check_replaceable(folder, _STAGE)
    with atomic_directory(folder, _STAGE) as partial:
        counts = _Counts()
        records = [
            _write_shard(partial, number, samples, vocab_size, target.name)
            for number, samples in enumerate(_shards(_labelled(corpus, counts)))
        ]
        if not records:
            corpus.survey()  # says what is wrong with the text
            raise ValueError(f"{text.source} has no sample to train on")
        manifest = _manifest(replace(identity, mask=corpus.mask_recipe), records, counts, partial)
        manifest.save(partial)
        atomic_write(partial / DROPPED_FILE, dropped_lines(counts.dropped))
        config = {**asdict(manifest.identity), "template": text.template}
        inputs = {str(text.source): manifest.identity.source}
        provenance.write(partial, provenance.record(provenance.command_line(), config, inputs))
    print(f"{manifest.num_samples} samples in {folder}; {summary(counts.dropped)}")
    return folder


@dataclass
class _Counts:
    dropped: list[Dropped] = field(default_factory=list)
    num_cut: int = 0
    lengths: array = field(default_factory=lambda: array("i"))


def _manifest(identity: CacheIdentity, records: Sequence[ShardRecord], counts: _Counts, folder: Path) -> Manifest:
    lengths = write_lengths(folder, np.asarray(counts.lengths, dtype=np.int32))
    return Manifest(
        identity=identity,
        num_samples=sum(record.num_samples for record in records),
        num_tokens=sum(record.num_tokens for record in records),
        num_labelled=sum(record.num_labelled for record in records),
        num_dropped=len(counts.dropped),
        num_cut=counts.num_cut,
        lengths_sha256=sha256_file(lengths),
    ).with_shards(records)


def _corpus_and_identity(text: TextSource, target: TargetFiles) -> tuple[Corpus, CacheIdentity, int]:
    tokenizer = load_tokenizer(target.name, target.revision, target.trust_remote_code)
    config = read_config(resolve(target.name, target.revision), target.trust_remote_code).get_text_config()
    length = sample_length(text.max_length, context_of(config, target.context), target.name)
    corpus = Corpus(
        Path(text.source),
        functools.partial(
            chat_of, target.name, tokenizer, text.template, target.revision, target.trust_remote_code, text.rendering
        ),
        text.split,
        length,
        int(config.vocab_size),
        text.trained_on,
    )
    own_tokenizer = tokenizer_fingerprint(tokenizer)
    corpus.check_tokenizer(own_tokenizer)
    identity = CacheIdentity(
        target=target.name,
        target_revision=target.revision,
        target_fingerprint=target_fingerprint(target.name, target.revision, target.adapter),
        tokenizer_fingerprint=own_tokenizer,
        template_fingerprint=rendering_fingerprint(tokenizer, text.template, text.rendering),
        template_args=text.rendering.as_text,
        trained_on=text.trained_on.as_text,
        layers=(),
        hidden_size=int(config.hidden_size),
        dtype="float32",
        target_dtype="float32",
        source=corpus.fingerprint,
        split=text.split,
        mask="",
        max_length=length,
        local_horizon=0,
        shard_mib=0.0,
        batch_tokens=0,
        vocab_size=int(config.vocab_size),
    )
    return corpus, identity, int(config.vocab_size)


def _check_same(folder: Path, identity: CacheIdentity) -> None:
    manifest = Manifest.load(folder)
    # How masks were found is known only when rows have been read.
    differences = manifest.differences(replace(identity, mask=manifest.identity.mask))
    if differences:
        raise ValueError(
            f"{folder} holds the tokens of other text or of another target ({'; '.join(differences)}); "
            "name another folder or delete this one"
        )


def _labelled(corpus: Corpus, counts: _Counts) -> Iterator[TokenizedSample]:
    with progress(f"tokenize {corpus.source}", None, "samples", brief=True) as advance:
        for sample in corpus.all_samples(counts.dropped):
            advance(1)
            short = cut(sample, corpus.max_length)
            counts.num_cut += short is not sample
            if not short.num_labelled:
                counts.dropped.append(
                    Dropped(f"sample {sample.id}", why_unlabelled(sample, corpus.max_length), id=sample.id)
                )
                continue
            counts.lengths.append(len(short.input_ids))
            yield short


def _shards(samples: Iterator[TokenizedSample]) -> Iterator[list[TokenizedSample]]:
    shard: list[TokenizedSample] = []
    tokens = 0
    for sample in samples:
        shard.append(sample)
        tokens += len(sample.input_ids)
        if tokens >= _SHARD_TOKENS:
            yield shard
            shard, tokens = [], 0
    if shard:
        yield shard


def _write_shard(
    folder: Path, number: int, samples: Sequence[TokenizedSample], vocab_size: int, name: str
) -> ShardRecord:
    ids = torch.tensor([token for sample in samples for token in sample.input_ids], dtype=torch.int32)
    outside = ((ids < 0) | (ids >= vocab_size)).nonzero()
    if len(outside):
        raise ValueError(
            f"the corpus holds token id {int(ids[outside[0]])}, but {name} has {vocab_size} tokens; "
            "is the text in this target's tokens?"
        )
    content = ShardContent(
        ids=[sample.id for sample in samples],
        offsets=torch.tensor(list(itertools.accumulate((len(s.input_ids) for s in samples), initial=0))),
        input_ids=ids,
        loss_mask=torch.tensor([kept for sample in samples for kept in sample.loss_mask], dtype=torch.bool),
        hidden={},
        greedy_ids=None,
    )
    return write_shard(folder / f"shard-{number:05d}.safetensors", content)
