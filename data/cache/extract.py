"""The command `draftsmith data extract`: chosen layers of a frozen target over tokenized samples, as a cache of hidden states.

Owns: the command, and which process makes which shard. Does not know how samples are made (`corpus.py`), how a process gets states
(`extraction.py`), or the files' layout (`shards.py`, `manifest.py`). Does not know either what is there of a cache that is being made
(`cache_folder.py`), nor training.
"""

import contextlib
import errno
import hashlib
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

from transformers import PreTrainedTokenizerBase

from draftsmith.arguments import FLAT
from draftsmith.data.cache.cache_folder import SURVEY_PREFIX, CacheFolder
from draftsmith.data.cache.disk_use import footprint
from draftsmith.data.cache.engine_states import NO_ENGINE, EngineOptions
from draftsmith.data.cache.extraction import Extraction, StorageOptions, Worker, identity_of_forwards, open_worker
from draftsmith.data.cache.reader import HiddenStateCache
from draftsmith.data.cache.sharded_extraction import Features
from draftsmith.data.cache.shared_survey import shared_survey
from draftsmith.data.cache.show import assistant_tokens
from draftsmith.data.cache.verify_cache import compare, verify
from draftsmith.data.chat_template import chat_of
from draftsmith.data.chats.token_kinds import EVERYTHING, TrainedOn
from draftsmith.data.chats.tokenized_samples import sample_length
from draftsmith.data.corpus import Corpus
from draftsmith.data.corpus_survey import Survey, begun_anew
from draftsmith.data.progress import progress
from draftsmith.data.shards.eight_bit import stored_dtype
from draftsmith.data.shards.manifest import CacheIdentity, Manifest
from draftsmith.data.shards.packing import plan_batches
from draftsmith.data.shards.shards import CachedSample, bytes_per_token
from draftsmith.data.shared_work import OWN_SHARE, Share, ShareOptions
from draftsmith.json_rows import summary
from draftsmith.models.files.device_and_dtype import AUTO
from draftsmith.models.files.fingerprint import tokenizer_fingerprint
from draftsmith.models.target.options import PlacementOptions
from draftsmith.models.target.prompt_template import OWN_TEMPLATE, TemplateChoice, rendering_fingerprint

__all__ = ["CachedSample", "HiddenStateCache", "compare", "extract", "verify"]

_DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO)
LAST_STATES = StorageOptions()
ANYWHERE = PlacementOptions()


def extract(
    target: str,
    source: Path,
    out: Path,
    split: str | None = None,
    storage: Annotated[StorageOptions, FLAT] = LAST_STATES,
    target_dtype: str = AUTO,
    target_sharding: Literal["none", "tp"] = "none",
    share: Annotated[ShareOptions, FLAT] = OWN_SHARE,
    where: Annotated[PlacementOptions, FLAT] = ANYWHERE,
    rendering: Annotated[TemplateChoice, FLAT] = OWN_TEMPLATE,
    engine: Annotated[EngineOptions, FLAT] = NO_ENGINE,
    trained_on: Annotated[TrainedOn, FLAT] = EVERYTHING,
) -> None:
    """Runs the target over samples and stores its hidden states, or stores those that a serving engine computed.

    SOURCE is what `data respond` wrote (the target's own replies), or a file of conversations. To resume a run, start the same command
    again: it ends with the same bytes. Several processes share the shards by rank, at any time and in any number.

    Args:
        target: Path or hub id of the target.
        source: A folder or JSONL file of replies, conversations or documents.
        out: The folder of the cache.
        split: Keep only samples of this split.
        storage: What the cache holds; see `StorageOptions`.
        target_dtype: What the target runs in: float32, bfloat16 or float16; auto: its checkpoint's own on CUDA, float32 on a CPU.
        target_sharding: tp: all processes of torchrun hold the target together, and the first one writes all shards.
        share: Which part of the shards this process makes; see `ShareOptions`.
        where: Where the target runs; see `PlacementOptions`.
        rendering: The chat template; see `TemplateChoice`.
        engine: States of a serving engine; see `EngineOptions`.
        trained_on: What of the assistant's turns is trained on; see `TrainedOn`.
    """
    where = where.placed()
    dtype = where.resolve_dtype(target, target_dtype)
    asked = Extraction(
        target, source, out, split, storage, dtype, target_sharding, share, where, rendering, engine, trained_on
    )
    with contextlib.ExitStack() as stack:
        worker = open_worker(asked, stack)
        if worker is None:
            return  # the first process writes what this one has helped to compute
        tokenizer = where.tokenizer(target)
        corpus = _corpus(asked, worker, tokenizer)
        rendered_by = rendering_fingerprint(tokenizer, rendering.template, rendering.options)
        with _explaining_a_full_disk(out):
            survey = _survey(corpus, tokenizer_fingerprint(tokenizer), rendered_by, out, worker.share)
            identity = replace(
                identity_of_forwards(worker.ends, storage),
                target_revision=where.revision,
                target_dtype=dtype,
                target_quantization=where.quantization,
                tokenizer_fingerprint=tokenizer_fingerprint(tokenizer),
                template_fingerprint=rendered_by,
                template_args=rendering.as_text,
                **_identity_of_text(corpus, survey),
                states_from=None if engine.states is None else "engine",
            )
            manifest = _make(CacheFolder(out), worker.share, corpus, survey, identity, worker.compute)
    _report(out, manifest, worker.share, survey)


def _corpus(asked: Extraction, worker: Worker, tokenizer: PreTrainedTokenizerBase) -> Corpus:
    """The samples of the source.

    Raises:
        ValueError: it holds another tokenizer's ids, or the target does not have a layer.
    """
    for layer in asked.storage.layers:
        worker.check_layer(layer)
    ends, where, rendering = worker.ends, asked.where, asked.rendering
    length = sample_length(asked.storage.max_length, ends.max_positions, ends.name)
    revision, trust = where.revision, where.trust_remote_code
    chat = partial(chat_of, ends.name, tokenizer, rendering.template, revision, trust, rendering.options)
    corpus = Corpus(asked.source, chat, asked.split, length, ends.vocab_size, asked.trained_on)
    corpus.check_tokenizer(tokenizer_fingerprint(tokenizer))
    return corpus


def _identity_of_text(corpus: Corpus, survey: Survey) -> dict[str, Any]:
    """What an identity holds of the samples."""
    return {
        "source": corpus.fingerprint,
        "split": corpus.split,
        "mask": survey.mask,
        "max_length": corpus.max_length,
        "trained_on": corpus.trained_on.as_text,
    }


def _make(
    folder: CacheFolder, share: Share, corpus: Corpus, survey: Survey, identity: CacheIdentity, compute: Features
) -> Manifest:
    """This rank's shards, and the manifest as far as all ranks have come."""
    folder.begin(_empty_manifest(identity, survey), survey.dropped, {str(corpus.source): identity.source})
    try:
        _write_shards(folder, share, corpus, survey, identity, compute)
    except (ValueError, OSError):
        with contextlib.suppress(OSError):  # the disk may be full: the records beside the shards are enough
            folder.gather(survey.lengths)
        raise
    return folder.gather(survey.lengths)


def _report(out: Path, manifest: Manifest, share: Share, survey: Survey) -> None:
    if not manifest.complete:
        there = sum(shard.num_samples for shard in manifest.shards)
        print(
            f"rank {share.rank} of {share.world_size} is done: {there} of {manifest.num_samples} samples are in {out}; "
            "it is complete once the other ranks are done too"
        )
        return
    print(
        f"{manifest.num_samples:,} samples, {manifest.num_tokens:,} tokens ({manifest.num_labelled / manifest.num_tokens:.0%} trained on) "
        f"in {len(manifest.shards)} shard{'s' * (len(manifest.shards) != 1)}: {out}; "
        f"{manifest.num_cut} samples cut; {summary(survey.dropped)}"
    )
    print(assistant_tokens(manifest), footprint(manifest), sep="\n")
    if survey.num_begun_anew:
        print(begun_anew(survey.num_begun_anew))


def _survey(corpus: Corpus, tokenizer: str, rendered_by: str, out: Path, share: Share) -> Survey:
    """One process reads the corpus itself; several divide it, and leave the parts for one another beside the shards."""
    if share.world_size == 1:
        return corpus.survey()
    settings = repr(
        (
            "samples",
            *(corpus.fingerprint, corpus.split, corpus.max_length, corpus.vocab_size, corpus.trained_on.as_text),
            *(tokenizer, rendered_by),
        )
    )
    key = hashlib.sha256(settings.encode()).hexdigest()[:16]
    return shared_survey(corpus, out / f"{SURVEY_PREFIX}{key}", share)


def _empty_manifest(identity: CacheIdentity, survey: Survey) -> Manifest:
    return Manifest(
        identity=identity,
        num_samples=len(survey.lengths),
        num_tokens=sum(survey.lengths),
        num_labelled=survey.num_labelled,
        num_dropped=len(survey.dropped),
        num_cut=survey.num_cut,
        trained_tokens=survey.trained_tokens,
        read_tokens=survey.read_tokens,
        modes=survey.modes,
    )


def _plan(lengths: Sequence[int], identity: CacheIdentity) -> list[tuple[int, int]]:
    """First sample and the one after the last of each shard: a function of the corpus, whoever asks."""
    per_token = bytes_per_token(
        identity.hidden_size, len(identity.layers), stored_dtype(identity.dtype), identity.local_horizon
    )
    plan = plan_batches(lengths, max(1, int(identity.shard_mib * 2**20 / per_token)))
    return [(batch[0], batch[-1] + 1) for batch in plan]


def _write_shards(
    folder: CacheFolder, share: Share, corpus: Corpus, survey: Survey, identity: CacheIdentity, compute: Features
) -> None:
    """Makes this rank's shards that are not there. A shard's samples are read while the one before is computed."""
    plan = _plan(survey.lengths, identity)
    own = share.own(len(plan))
    there = folder.keep_good(own)
    left = [number for number in own if number not in there]
    tokens = {number: sum(survey.lengths[slice(*plan[number])]) for number in own}
    done = sum(tokens[number] for number in there)
    with (
        ThreadPoolExecutor(max_workers=1) as reader,
        ThreadPoolExecutor(max_workers=1) as writer,
        progress("extract", sum(tokens.values()), "tokens", done=done) as advance,
    ):
        writing: Future[None] | None = None
        reading = [reader.submit(corpus.samples, survey, *plan[number]) for number in left[:1]]
        for following, number in enumerate(left, start=1):
            samples = reading.pop().result()
            if following < len(left):
                reading.append(reader.submit(corpus.samples, survey, *plan[left[following]]))
            if folder.has(number):
                continue  # a process of another world size has made it meanwhile
            content = compute(samples, identity, advance)
            if writing is not None:
                writing.result()
            writing = writer.submit(folder.add, number, content)
        if writing is not None:
            writing.result()


@contextlib.contextmanager
def _explaining_a_full_disk(out: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno in _DISK_ERRORS:
            raise ValueError(
                f"{out}: the disk does not take another shard ({error.strerror}); the shards written so far are whole: "
                "free space and run the same command again"
            ) from error
        raise
