"""The command `draftsmith data extract`: chosen layers of a frozen target over tokenized samples, as a cache of hidden states.

Owns: the command, and which process makes which shard. Does not know how samples are made (`corpus.py`), the forward
(`features.py`), or the files' layout (`shards.py`, `manifest.py`). Does not know either what is there of a cache that is being made
(`cache_folder.py`), nor training.
"""

import contextlib
import errno
import hashlib
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from transformers import PreTrainedTokenizerBase

from draftsmith.arguments import FLAT
from draftsmith.data.cache.cache_folder import SURVEY_PREFIX, CacheFolder
from draftsmith.data.cache.disk_use import footprint
from draftsmith.data.cache.engine_states import NO_ENGINE, EngineOptions, open_source
from draftsmith.data.cache.features import features, features_of_engine, num_embeddings
from draftsmith.data.cache.reader import HiddenStateCache
from draftsmith.data.cache.sharded_extraction import Features, follow, leading, process_group
from draftsmith.data.cache.shared_survey import shared_survey
from draftsmith.data.cache.show import assistant_tokens
from draftsmith.data.cache.verify_cache import compare, verify
from draftsmith.data.chat_template import chat_of
from draftsmith.data.chats.token_kinds import EVERYTHING, TrainedOn
from draftsmith.data.corpus import Corpus
from draftsmith.data.corpus_survey import Survey, begun_anew
from draftsmith.data.progress import progress
from draftsmith.data.shards.eight_bit import stored_dtype
from draftsmith.data.shards.manifest import CacheIdentity, Manifest
from draftsmith.data.shards.packing import plan_batches
from draftsmith.data.shards.shards import CachedSample, bytes_per_token
from draftsmith.data.shared_work import OWN_SHARE, Share, ShareOptions
from draftsmith.files import exclusive
from draftsmith.json_rows import summary
from draftsmith.models.files.device_and_dtype import AUTO, as_dtype
from draftsmith.models.files.fingerprint import tokenizer_fingerprint
from draftsmith.models.target.options import PlacementOptions
from draftsmith.models.target.prompt_template import OWN_TEMPLATE, TemplateChoice, rendering_fingerprint
from draftsmith.models.target.sharding import load_sharded, sharded_over
from draftsmith.models.target.target import TargetEnds

__all__ = ["CachedSample", "HiddenStateCache", "compare", "extract", "verify"]

StoredDtype = Literal["bfloat16", "float16", "float32", "float8_e4m3"]
_DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO)


@dataclass(frozen=True, kw_only=True)
class StorageOptions:
    """What a cache holds of each sample.

    Args:
        layers: Names of the layers to store: `last.pre_norm`, `layer.3.output`, ...
        dtype: Stored dtype of the states; float8_e4m3 keeps eight bits and a scale a token.
        max_length: Cut samples to this many tokens; default: the target's context.
        local_horizon: Store this many greedy tokens of the target after each position (for `local` distillation).
        batch_tokens: Tokens of one forward, padding included.
        shard_mib: Size of a shard in MiB.

    Raises:
        ValueError: no layer, a layer twice, or a number outside its range.
    """

    layers: tuple[str, ...] = ("last.pre_norm",)
    dtype: StoredDtype = "bfloat16"
    max_length: int | None = None
    local_horizon: int = 0
    batch_tokens: int = 4096
    shard_mib: float = 64.0

    def __post_init__(self) -> None:
        if not self.layers or len(set(self.layers)) < len(self.layers):
            raise ValueError(f"layers are {list(self.layers)}; name at least one, and each once")
        if self.local_horizon < 0:
            raise ValueError(
                f"local_horizon is {self.local_horizon}; it must be at least 0, which stores no greedy tokens"
            )
        if self.batch_tokens < 1:
            raise ValueError(f"batch_tokens is {self.batch_tokens}; it must be at least 1")
        if not 0.0 < self.shard_mib < float("inf"):
            raise ValueError(f"shard_mib is {self.shard_mib}; it must be a positive number of MiB")


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
    target_dtype = where.resolve_dtype(target, target_dtype)
    with contextlib.ExitStack() as stack:
        worker: _Worker | None
        if engine.states is not None:
            worker = _engine_worker(stack, out, target, target_dtype, where, share.own(), storage, engine)
        else:
            worker = _own_worker(stack, out, target, target_dtype, target_sharding, where, share, storage)
        if worker is None:
            return  # the first process writes what this one has helped to compute
        tokenizer = where.tokenizer(target)
        corpus = _corpus(source, split, worker, tokenizer, storage, where, rendering, trained_on)
        rendered_by = rendering_fingerprint(tokenizer, rendering.template, rendering.options)
        with _explaining_a_full_disk(out):
            survey = _survey(corpus, tokenizer_fingerprint(tokenizer), rendered_by, out, worker.share)
            identity = replace(
                _identity_of_forwards(worker.ends, storage),
                **_placed(where, target_dtype),
                tokenizer_fingerprint=tokenizer_fingerprint(tokenizer),
                template_fingerprint=rendered_by,
                template_args=rendering.as_text,
                **_identity_of_text(corpus, survey),
                states_from=None if engine.states is None else "engine",
            )
            manifest = _make(CacheFolder(out), worker.share, corpus, survey, identity, worker.compute)
    _report(out, manifest, worker.share, survey)


@dataclass(frozen=True)
class _Worker:
    """This process's part of the work: which shards, and how it computes states."""

    share: Share
    ends: TargetEnds
    compute: Features
    check_layer: Callable[[str], None]


def _whole_worker(
    stack: contextlib.ExitStack, out: Path, target: str, dtype: str, where: PlacementOptions, share: Share
) -> _Worker:
    """A process with a target of its own."""
    _claim(stack, out, share)
    loaded = where.load(target, dtype)
    return _Worker(share, loaded.ends, partial(features, loaded), loaded.check_layer)


def _engine_worker(
    stack: contextlib.ExitStack,
    out: Path,
    target: str,
    dtype: str,
    where: PlacementOptions,
    share: Share,
    storage: StorageOptions,
    engine: EngineOptions,
) -> _Worker:
    """A process that reads what an engine computed; of the target it loads the ends alone.

    Raises:
        ValueError: greedy tokens are asked for, which only the target itself can give; or as :func:`open_source`.
    """
    if storage.local_horizon:
        raise ValueError(
            f"local_horizon is {storage.local_horizon}, but an engine's states hold no greedy continuations; set it to 0, or "
            "leave --states out"
        )
    _claim(stack, out, share)
    ends = TargetEnds.load(
        target, as_dtype(dtype), "cpu", where.revision, where.adapter, where.trust_remote_code, where.context
    )
    source = open_source(engine, ends, storage.layers, sample_length(storage.max_length, ends.max_positions, ends.name))
    return _Worker(share, ends, partial(features_of_engine, source), lambda _: None)


def _own_worker(
    stack: contextlib.ExitStack,
    out: Path,
    target: str,
    target_dtype: str,
    target_sharding: str,
    where: PlacementOptions,
    share: ShareOptions,
    storage: StorageOptions,
) -> _Worker | None:
    """The worker that runs the target here, whole or divided; None where another process writes what this one computes."""
    if target_sharding == "tp":
        return _sharded_worker(stack, out, target, target_dtype, where, share, storage)
    return _whole_worker(stack, out, target, target_dtype, where, share.own())


def _sharded_worker(
    stack: contextlib.ExitStack,
    out: Path,
    target: str,
    dtype: str,
    where: PlacementOptions,
    share: ShareOptions,
    storage: StorageOptions,
) -> _Worker | None:
    """The first of the processes that hold a target together; in each of the others, None once the first one is done.

    Raises:
        ValueError: options that do not go with a target which processes hold together.
    """
    options = vars(share) | vars(where)
    given = [
        name for name in ("rank", "world_size", "device_map", "adapter", "quantization") if options[name] is not None
    ]
    if given:
        raise ValueError(
            f"target_sharding tp divides the target's own weights among all processes of torchrun; {', '.join(given)} cannot be "
            "combined with it; leave that out, or set target_sharding to none"
        )
    own = share.own()
    stack.enter_context(process_group())
    device = torch.device(where.device)
    over = sharded_over("tp")
    loaded = load_sharded(target, dtype, over, device, where.revision, where.trust_remote_code, where.context)
    if own.rank > 0:
        follow(loaded, _identity_of_forwards(loaded.ends, storage))
        return None
    compute = stack.enter_context(leading(loaded))
    _claim(stack, out, Share())
    return _Worker(Share(), loaded.ends, compute, loaded.check_layer)


def _claim(stack: contextlib.ExitStack, out: Path, share: Share) -> None:
    """Hold the right to make this share of the cache.

    Raises:
        ValueError: another process holds it, or the place is taken.
    """
    whole = out.absolute()  # "." has no name of its own
    stack.enter_context(exclusive(whole.with_name(whole.name + share.suffix)))
    CacheFolder(out).check_place()


def _corpus(
    source: Path,
    split: str | None,
    worker: _Worker,
    tokenizer: PreTrainedTokenizerBase,
    storage: StorageOptions,
    where: PlacementOptions,
    rendering: TemplateChoice,
    trained_on: TrainedOn,
) -> Corpus:
    """The samples of the source.

    Raises:
        ValueError: it holds another tokenizer's ids, or the target does not have a layer.
    """
    for layer in storage.layers:
        worker.check_layer(layer)
    ends = worker.ends
    length = sample_length(storage.max_length, ends.max_positions, ends.name)
    revision, trust = where.revision, where.trust_remote_code
    chat = partial(chat_of, ends.name, tokenizer, rendering.template, revision, trust, rendering.options)
    corpus = Corpus(source, chat, split, length, ends.vocab_size, trained_on)
    corpus.check_tokenizer(tokenizer_fingerprint(tokenizer))
    return corpus


def _placed(where: PlacementOptions, target_dtype: str) -> dict[str, Any]:
    """What an identity says of how the target was loaded."""
    return {
        "target_revision": where.revision,
        "target_dtype": target_dtype,
        "target_quantization": where.quantization,
    }


def _identity_of_forwards(ends: TargetEnds, storage: StorageOptions) -> CacheIdentity:
    """As much of an identity as forwards depend on: all of it that a process knows which reads no text."""
    return CacheIdentity(
        target=ends.name,
        target_revision=None,
        target_fingerprint=ends.fingerprint,
        tokenizer_fingerprint="",
        template_fingerprint="",
        layers=storage.layers,
        hidden_size=ends.hidden_size,
        dtype=storage.dtype,
        target_dtype="",
        source="",
        split=None,
        mask="",
        max_length=0,
        local_horizon=storage.local_horizon,
        shard_mib=storage.shard_mib,
        batch_tokens=storage.batch_tokens,
        vocab_size=num_embeddings(ends),
    )


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


def sample_length(asked: int | None, context: int | None, target: str) -> int:
    """The tokens that samples are cut to: as many as asked for, or the target's whole context.

    Args:
        asked: in tokens; None for the context.
        context: of the target, in tokens; None where nobody knows.
        target: its name, for the message.

    Returns:
        Tokens.

    Raises:
        ValueError: less than 2, more than the context, or neither is known.
    """
    if asked is not None and asked < 2:
        raise ValueError(f"max_length is {asked}; a sample needs at least 2 tokens")
    if context is not None and asked is not None and asked > context:
        raise ValueError(f"max_length is {asked}, but {target} has a context of {context} tokens; set at most that")
    if asked is None and context is None:
        raise ValueError(f"{target} does not say how long its context is; set max_length")
    return asked or context or 0


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
