"""Making and checking hidden-state caches: chosen layers of a frozen target over tokenized samples.

Owns: the two commands, which process makes which shard, and the recomputing check. Does not know: how samples are made
(`corpus.py`), the forward (`features.py`), the files' layout (`shards.py`, `manifest.py`), what is there of a cache that
is being made (`cache_folder.py`), training.

Shape legend: T tokens, D hidden.
"""

import contextlib
import errno
import hashlib
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Annotated, Literal

import torch

from draftsmith.arguments import FLAT
from draftsmith.data.cache.cache_folder import SURVEY_PREFIX, CacheFolder
from draftsmith.data.cache.disk_use import footprint
from draftsmith.data.cache.features import features, num_embeddings
from draftsmith.data.cache.reader import Check, HiddenStateCache
from draftsmith.data.cache.sharded_extraction import Features, follow, leading, process_group
from draftsmith.data.cache.shared_survey import shared_survey
from draftsmith.data.corpus import Corpus
from draftsmith.data.progress import progress
from draftsmith.data.shards.eight_bit import CODES, LARGEST_ERROR, stored_dtype
from draftsmith.data.shards.manifest import CacheIdentity, Manifest
from draftsmith.data.shards.packing import plan_batches
from draftsmith.data.shards.shards import CachedSample, bytes_per_token
from draftsmith.data.shared_work import Share, own_device, own_share
from draftsmith.data.survey import Survey, begun_anew
from draftsmith.data.tokens import TokenizedSample, chat_of
from draftsmith.files import exclusive
from draftsmith.foreign import visible
from draftsmith.json_rows import summary
from draftsmith.models.files.fingerprint import tokenizer_fingerprint
from draftsmith.models.files.loading import load_tokenizer
from draftsmith.models.target.options import TargetOptions
from draftsmith.models.target.prompt_template import NO_OPTIONS, TemplateOptions, rendering_fingerprint
from draftsmith.models.target.sharding import load_sharded, sharded_over
from draftsmith.models.target.target import Target

__all__ = ["CachedSample", "HiddenStateCache", "extract", "verify"]

StoredDtype = Literal["bfloat16", "float16", "float32", "float8_e4m3"]
_TOLERANCE = 0.02
_DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO)


def extract(
    target: str,
    source: Path,
    out: Path,
    split: str | None = None,
    layers: tuple[str, ...] = ("last.pre_norm",),
    dtype: StoredDtype = "bfloat16",
    template: str | None = None,
    max_length: int | None = None,
    local_horizon: int = 0,
    batch_tokens: int = 4096,
    shard_mib: float = 64.0,
    target_dtype: str = "float32",
    device: str = "cpu",
    device_map: str | None = None,
    revision: str | None = None,
    adapter: str | None = None,
    quantization: str | None = None,
    rank: int | None = None,
    world_size: int | None = None,
    target_sharding: Literal["none", "tp"] = "none",
    trust_remote_code: bool = False,
    context: int | None = None,
    rendering: Annotated[TemplateOptions, FLAT] = NO_OPTIONS,
) -> None:
    """Runs the target over samples and stores its hidden states.

    SOURCE is what `data respond` wrote (the target's own replies, token by token), or a file of conversations. A killed
    run continues at the next shard when it is started again, and ends with the same bytes. Several processes share the
    shards by rank; they need not run at the same time, and may be replaced by another number of them.

    Args:
        target: path or hub id of the target.
        source: a folder or JSONL file of replies, conversations or documents.
        out: the folder of the cache.
        split: keep only samples of this split.
        layers: names of the layers to store: `last.pre_norm`, `layer.3.output`, ...
        dtype: stored dtype of the states; float8_e4m3 keeps eight bits and a scale a token.
        template: Jinja file for conversations, or `none` for plain text; default: the tokenizer's own.
        max_length: cut samples to this many tokens; default: the target's context.
        local_horizon: store this many greedy tokens of the target after each position (for `local` distillation).
        batch_tokens: tokens of one forward, padding included.
        shard_mib: size of a shard in MiB.
        target_dtype: dtype the target runs in.
        device: device the target runs on; under torchrun, cuda is each process's own GPU.
        device_map: spreads a large target over devices, as in `transformers`.
        revision: revision of a hub id.
        adapter: PEFT adapter on top of the target.
        quantization: quantisation of the target's weights.
        rank: which share of the shards this process makes; default: RANK of the environment, or 0.
        world_size: how many processes share the shards; default: WORLD_SIZE of the environment, or 1.
        target_sharding: tp: all processes of torchrun hold the target together, and the first one writes all shards.
        trust_remote_code: run Python files that come with the target; read them first.
        context: most tokens that the target reads; default: from its config, as serving engines derive it.
        rendering: the chat template's name and variables; see `TemplateOptions`.
    """
    _check_settings(layers, local_horizon, batch_tokens, shard_mib)
    with contextlib.ExitStack() as stack:
        share, compute = own_share(rank, world_size), None
        if target_sharding == "tp":
            _check_together(rank, world_size, device_map, adapter, quantization)
            stack.enter_context(process_group())
            loaded = load_sharded(
                target,
                target_dtype,
                sharded_over("tp"),
                torch.device(own_device(device)),
                revision,
                trust_remote_code,
                context,
            )
            if share.rank > 0:
                follow(loaded, _identity_of_forwards(layers, loaded, dtype, local_horizon, batch_tokens))
                return
            share, compute = Share(), stack.enter_context(leading(loaded))
        whole = out.absolute()  # "." has no name of its own
        stack.enter_context(exclusive(whole.with_name(whole.name + share.suffix)))
        CacheFolder(out).check_place()
        if compute is None:
            where = TargetOptions(
                own_device(device), device_map, revision, adapter, quantization, trust_remote_code, context
            )
            loaded = where.load(target, target_dtype)
            compute = partial(features, loaded)
        for layer in layers:
            loaded.check_layer(layer)
        tokenizer = load_tokenizer(target, revision, trust_remote_code)
        length = sample_length(max_length, loaded.max_positions, target)
        chat = partial(chat_of, target, tokenizer, template, revision, trust_remote_code, rendering)
        corpus = Corpus(source, chat, split, length, loaded.ends.vocab_size)
        corpus.check_tokenizer(tokenizer_fingerprint(tokenizer))
        rendered_by = rendering_fingerprint(tokenizer, template, rendering)
        with _explaining_a_full_disk(out):
            survey = _survey(corpus, tokenizer_fingerprint(tokenizer), rendered_by, out, share)
        identity = CacheIdentity(
            target=target,
            target_revision=revision,
            target_fingerprint=loaded.fingerprint,
            tokenizer_fingerprint=tokenizer_fingerprint(tokenizer),
            template_fingerprint=rendered_by,
            layers=tuple(layers),
            hidden_size=loaded.ends.hidden_size,
            dtype=dtype,
            target_dtype=target_dtype,
            source=corpus.fingerprint,
            split=split,
            mask=survey.mask,
            max_length=length,
            local_horizon=local_horizon,
            shard_mib=shard_mib,
            batch_tokens=batch_tokens,
            target_quantization=quantization,
            vocab_size=num_embeddings(loaded),
            template_args=rendering.as_text,
        )
        with _explaining_a_full_disk(out):
            finished = _make(CacheFolder(out), share, corpus, survey, identity, compute)
    _report(out, finished, share, survey)


def _check_settings(layers: Sequence[str], local_horizon: int, batch_tokens: int, shard_mib: float) -> None:
    """What would be wrong with any target; said before one is loaded."""
    if not layers or len(set(layers)) < len(layers):
        raise ValueError(f"layers are {list(layers)}; name at least one, and each once")
    if local_horizon < 0:
        raise ValueError(f"local_horizon is {local_horizon}; it must be at least 0, which stores no greedy tokens")
    if batch_tokens < 1:
        raise ValueError(f"batch_tokens is {batch_tokens}; it must be at least 1")
    if not 0.0 < shard_mib < float("inf"):
        raise ValueError(f"shard_mib is {shard_mib}; it must be a positive number of MiB")


def _check_together(
    rank: int | None, world_size: int | None, device_map: str | None, adapter: str | None, quantization: str | None
) -> None:
    given = {
        "rank": rank,
        "world_size": world_size,
        "device_map": device_map,
        "adapter": adapter,
        "quantization": quantization,
    }
    wrong = [name for name, value in given.items() if value is not None]
    if wrong:
        raise ValueError(
            "target_sharding tp divides the target's weights, as its files have them, among all processes of torchrun, which "
            f"{', '.join(wrong)} does not go with; drop that, or the sharding"
        )


def _identity_of_forwards(
    layers: tuple[str, ...], target: Target, dtype: StoredDtype, local_horizon: int, batch_tokens: int
) -> CacheIdentity:
    """As much of an identity as forwards depend on, for a process that reads no text."""
    return CacheIdentity(
        target=target.name,
        target_revision=None,
        target_fingerprint=target.fingerprint,
        tokenizer_fingerprint="",
        template_fingerprint="",
        layers=tuple(layers),
        hidden_size=target.ends.hidden_size,
        dtype=dtype,
        target_dtype="",
        source="",
        split=None,
        mask="",
        max_length=0,
        local_horizon=local_horizon,
        shard_mib=0.0,
        batch_tokens=batch_tokens,
    )


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
        f"{manifest.num_samples} samples, {manifest.num_tokens} tokens "
        f"({manifest.num_labelled / manifest.num_tokens:.0%} trained on) in {len(manifest.shards)} shards: {out}; "
        f"{manifest.num_cut} samples cut; {summary(survey.dropped)}\n{footprint(manifest)}"
    )
    if survey.num_begun_anew:
        print(begun_anew(survey.num_begun_anew))


def _survey(corpus: Corpus, tokenizer: str, rendered_by: str, out: Path, share: Share) -> Survey:
    """One process reads the corpus itself; several divide it, and leave the parts for one another beside the shards."""
    if share.world_size == 1:
        return corpus.survey()
    settings = repr(
        ("samples", corpus.fingerprint, corpus.split, corpus.max_length, corpus.vocab_size, tokenizer, rendered_by)
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
    )


def sample_length(asked: int | None, context: int | None, target: str) -> int:
    """The tokens that samples are cut to: as many as asked for, or the target's whole context.

    Raises ValueError for less than 2, for more than the context, and where neither is known.
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


@dataclass(frozen=True)
class Comparison:
    """A cached sample against its recomputation.

    `max_difference` is the largest of a single number, `relative_difference` the largest of a token's state relative to
    that state's length; `greedy_agreement` is the share of equal greedy tokens (1 where none are stored).
    """

    sample: str
    layer: str
    max_difference: float
    relative_difference: float
    greedy_agreement: float


def verify(
    cache: Path,
    target: str | None = None,
    samples: int = 8,
    seed: int = 0,
    tolerance: float | None = None,
    device: str = "cpu",
    device_map: str | None = None,
    revision: str | None = None,
    adapter: str | None = None,
    quantization: str | None = None,
    check: Check = "open",
    trust_remote_code: bool = False,
    context: int | None = None,
) -> None:
    """Recomputes some samples of a cache through the target and compares; also checks every shard's sha256 and all states for NaN.

    Args:
        cache: the folder of the cache.
        target: path or hub id; default: the one the cache names.
        samples: how many samples to recompute, drawn at random.
        seed: another seed draws others.
        tolerance: largest allowed distance of a state from its recomputation, relative to the state's length; default:
            0.02, and with eight bits 0.09.
        device: device the target runs on.
        device_map: spreads a large target over devices, as in `transformers`.
        revision: revision of a hub id; default: the one the cache names, unless `target` is given.
        adapter: PEFT adapter on top of the target.
        quantization: quantisation of the target's weights; default: the one the cache names.
        check: whether shards are hashed and all states read first (`open`), as they are touched (`lazy`), or not (`off`).
        trust_remote_code: run Python files that come with the target; read them first.
        context: most tokens that the target reads; default: from its config, as serving engines derive it.
    """
    if samples < 1:
        raise ValueError(f"samples is {samples}; recompute at least 1")
    opened = HiddenStateCache(cache, check=check)
    identity = opened.manifest.identity
    if target is None:
        target, revision = identity.target, revision or identity.target_revision
    quantization = quantization or identity.target_quantization
    where = TargetOptions(device, device_map, revision, adapter, quantization, trust_remote_code, context)
    loaded = where.load(target, identity.target_dtype)
    opened.check_target(loaded.fingerprint, quantization, num_embeddings(loaded))
    if check == "open":
        opened.verify_states()
    eight_bits = stored_dtype(identity.dtype) == CODES
    allowed = tolerance if tolerance is not None else _TOLERANCE + (LARGEST_ERROR if eight_bits else 0.0)
    greedy_share = 1 - (_TOLERANCE if tolerance is None else tolerance)
    worst = list(compare(opened, loaded, samples, seed))
    for row in worst:
        differences = f"max difference {row.max_difference:.3e}  relative {row.relative_difference:.3e}"
        greedy = f"  greedy tokens equal {row.greedy_agreement:.1%}" if identity.local_horizon else ""
        print(visible(f"{row.sample}  {row.layer}  {differences}{greedy}"))
    failed = [row for row in worst if not row.relative_difference <= allowed or row.greedy_agreement < greedy_share]
    if failed:
        raise ValueError(
            f"{cache}: {len(failed)} of {len(worst)} comparisons differ by more than {allowed:.3g} "
            f"(first: {failed[0].sample}, {failed[0].layer}, {failed[0].relative_difference:.3e}); "
            "the cache does not hold this target's states"
        )
    print(f"{cache}: {min(samples, len(opened))} samples recomputed, all within {allowed:.3g}")


def compare(cache: HiddenStateCache, target: Target, num_samples: int, seed: int) -> Iterator[Comparison]:
    """Recomputes randomly drawn samples, one forward each; states of eight bits are held against whole ones."""
    generator = torch.Generator().manual_seed(seed)
    chosen = torch.randperm(len(cache), generator=generator)[:num_samples].tolist()
    identity = cache.manifest.identity
    if stored_dtype(identity.dtype) == CODES:
        identity = replace(identity, dtype="float32")
    for index in chosen:
        sample = cache[index]
        text = TokenizedSample(sample.id, sample.input_ids.tolist(), sample.loss_mask.tolist())
        again = features(target, [text], identity)
        agreement = 1.0
        if sample.greedy_ids is not None and again.greedy_ids is not None:
            agreement = float((sample.greedy_ids == again.greedy_ids).float().mean())
        for layer in identity.layers:
            stored_TD, fresh_TD = sample.hidden[layer].float(), again.hidden[layer].float()
            difference_TD = stored_TD - fresh_TD
            relative_T = difference_TD.norm(dim=-1) / fresh_TD.norm(dim=-1).clamp_min(1e-12)
            yield Comparison(sample.id, layer, float(difference_TD.abs().max()), float(relative_T.max()), agreement)
