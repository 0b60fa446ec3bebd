"""Making and checking hidden-state caches: chosen layers of a frozen target over tokenized samples.

Owns: the two commands, the resumable writing and the recomputing check. Does not know: how samples are made
(`corpus.py`), the forward (`features.py`), the files' layout (`shards.py`, `manifest.py`), training.

Shape legend: T tokens, D hidden.
"""

import errno
import itertools
import json
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import torch

from draftsmith import provenance
from draftsmith.data.cache import Check, HiddenStateCache
from draftsmith.data.corpus import Corpus, Survey
from draftsmith.data.features import features
from draftsmith.data.manifest import MANIFEST_FILE, CacheIdentity, Manifest
from draftsmith.data.packing import plan_batches
from draftsmith.data.progress import progress
from draftsmith.data.shards import CachedSample, ShardContent, bytes_per_token, check_digest, write_shard
from draftsmith.data.tokens import ChatTemplate, TokenizedSample
from draftsmith.files import atomic_write, exclusive
from draftsmith.models.fingerprint import template_fingerprint, tokenizer_fingerprint
from draftsmith.models.loading import as_dtype, load_tokenizer
from draftsmith.models.target import Target

__all__ = ["CachedSample", "HiddenStateCache", "extract", "verify"]

StoredDtype = Literal["bfloat16", "float16", "float32"]
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
) -> None:
    """Runs the target over samples and stores its hidden states.

    SOURCE is what `data respond` wrote (the target's own replies, token by token), or a file of conversations. A killed
    run continues at the next shard when it is started again, and ends with the same bytes.

    Args:
        target: path or hub id of the target.
        source: a folder or JSONL file of replies, conversations or documents.
        out: the folder of the cache.
        split: keep only samples of this split.
        layers: names of the layers to store: `last.pre_norm`, `layer.3.output`, ...
        dtype: stored dtype of the states.
        template: Jinja file for conversations, or `none` for plain text; default: the tokenizer's own.
        max_length: cut samples to this many tokens; default: the target's context.
        local_horizon: store this many greedy tokens of the target after each position (for `local` distillation).
        batch_tokens: tokens of one forward, padding included.
        shard_mib: size of a shard in MiB.
        target_dtype: dtype the target runs in.
        device: device the target runs on.
        device_map: spreads a large target over devices, as in `transformers`.
        revision: revision of a hub id.
        adapter: PEFT adapter on top of the target.
        quantization: quantisation of the target's weights.
    """
    with exclusive(out):
        loaded = Target.load(target, target_dtype, device, device_map, revision, adapter, quantization)
        tokenizer = load_tokenizer(target, revision)
        length = _max_length(max_length, loaded)
        corpus = Corpus(source, lambda: ChatTemplate(tokenizer, template), split, length)
        corpus.check_tokenizer(tokenizer_fingerprint(tokenizer))
        survey = corpus.survey()
        identity = CacheIdentity(
            target=target,
            target_revision=revision,
            target_fingerprint=loaded.fingerprint,
            tokenizer_fingerprint=tokenizer_fingerprint(tokenizer),
            template_fingerprint=template_fingerprint(tokenizer),
            layers=tuple(layers),
            hidden_size=loaded.ends.hidden_size,
            dtype=dtype,
            target_dtype=target_dtype,
            source=corpus.fingerprint,
            split=split,
            mask=corpus.mask_recipe,
            max_length=length,
            local_horizon=local_horizon,
            shard_mib=shard_mib,
            batch_tokens=batch_tokens,
        )
        manifest = _begin(out, identity, survey, source)
        finished = _write_shards(out, manifest, survey.lengths, corpus, loaded)
    share = finished.num_labelled / finished.num_tokens
    print(
        f"{finished.num_samples} samples, {finished.num_tokens} tokens ({share:.0%} trained on) in "
        f"{len(finished.shards)} shards: {out}; {finished.num_dropped} samples dropped, {finished.num_cut} cut"
    )


def _max_length(asked: int | None, target: Target) -> int:
    context = target.max_positions
    if asked is not None and asked < 2:
        raise ValueError(f"max_length is {asked}; a sample needs at least 2 tokens")
    if context is not None and asked is not None and asked > context:
        raise ValueError(f"max_length is {asked}, but {target.name} has a context of {context} tokens")
    if asked is None and context is None:
        raise ValueError(f"{target.name} does not say how long its context is; set --max-length")
    return asked or context or 0


def _begin(out: Path, identity: CacheIdentity, survey: Survey, source: Path) -> Manifest:
    """The manifest to continue from: a new one, or an earlier run's with its good shards."""
    if (out / MANIFEST_FILE).exists():
        return _resume(out, identity)
    if out.is_dir() and any(not path.name.startswith(".") for path in out.iterdir()):
        raise ValueError(f"{out} is not empty and no cache; name another folder")
    manifest = Manifest(
        identity=identity,
        num_samples=len(survey.lengths),
        num_tokens=sum(survey.lengths),
        num_labelled=survey.num_labelled,
        num_dropped=len(survey.skipped),
        num_cut=survey.num_cut,
    )
    manifest.save(out)
    atomic_write(out / "dropped.jsonl", "".join(json.dumps(asdict(row)) + "\n" for row in survey.skipped))
    provenance.write(out, provenance.record("data extract", asdict(identity), {str(source): identity.source}))
    return manifest


def _resume(out: Path, identity: CacheIdentity) -> Manifest:
    manifest = Manifest.load(out)
    differences = manifest.differences(identity)
    if differences:
        raise ValueError(
            f"{out} holds another cache ({'; '.join(differences)}); name another folder or delete this one"
        )
    for leftover in out.glob(".*.partial-*"):
        leftover.unlink()
    good = Manifest(**{**vars(manifest), "shards": (), "complete": False})
    for shard in manifest.shards:
        try:
            check_digest(out / shard.name, shard)
        except ValueError:
            break
        good = good.with_shard(shard)
    return good


def _write_shards(out: Path, manifest: Manifest, lengths: list[int], corpus: Corpus, target: Target) -> Manifest:
    identity = manifest.identity
    per_token = bytes_per_token(
        identity.hidden_size, len(identity.layers), as_dtype(identity.dtype), identity.local_horizon
    )
    plan = plan_batches(lengths, max(1, int(identity.shard_mib * 2**20 / per_token)))
    samples = iter(corpus)
    skipped = sum(shard.num_samples for shard in manifest.shards)
    tokens_there = sum(shard.num_tokens for shard in manifest.shards)
    for _ in itertools.islice(samples, skipped):
        pass
    with (
        ThreadPoolExecutor(max_workers=1) as writer,
        progress("extract", manifest.num_tokens, "tokens", done=tokens_there) as advance,
    ):
        pending: Future[Manifest] | None = None
        for number in range(len(manifest.shards), len(plan)):
            content = features(target, list(itertools.islice(samples, len(plan[number]))), identity, advance)
            if pending is not None:
                manifest = _settle(pending, out)
            pending = writer.submit(_write_one, out, number, content, manifest)
        return manifest if pending is None else _settle(pending, out)


def _write_one(out: Path, number: int, content: ShardContent, manifest: Manifest) -> Manifest:
    record = write_shard(out / f"shard-{number:05d}.safetensors", content)
    grown = manifest.with_shard(record)
    grown.save(out)
    return grown


def _settle(pending: Future[Manifest], out: Path) -> Manifest:
    try:
        return pending.result()
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
    tolerance: float = 0.02,
    device: str = "cpu",
    revision: str | None = None,
    adapter: str | None = None,
    check: Check = "open",
) -> None:
    """Recomputes some samples of a cache through the target and compares; also checks every shard's sha256.

    Args:
        cache: the folder of the cache.
        target: path or hub id; default: the one the cache names.
        samples: how many samples to recompute, drawn at random.
        seed: another seed draws others.
        tolerance: largest allowed distance of a state from its recomputation, relative to the state's length.
        device: device the target runs on.
        revision: revision of a hub id.
        adapter: PEFT adapter on top of the target.
        check: whether shards are hashed first (`open`), as they are touched (`lazy`), or not (`off`).
    """
    opened = HiddenStateCache(cache, check=check)
    identity = opened.manifest.identity
    loaded = Target.load(target or identity.target, identity.target_dtype, device, revision=revision, adapter=adapter)
    opened.check_target(loaded.fingerprint)
    worst = list(compare(opened, loaded, samples, seed))
    for row in worst:
        differences = f"max difference {row.max_difference:.3e}  relative {row.relative_difference:.3e}"
        greedy = f"  greedy tokens equal {row.greedy_agreement:.1%}" if identity.local_horizon else ""
        print(f"{row.sample}  {row.layer}  {differences}{greedy}")
    failed = [row for row in worst if not row.relative_difference <= tolerance or row.greedy_agreement < 1 - tolerance]
    if failed:
        raise ValueError(
            f"{cache}: {len(failed)} of {len(worst)} comparisons differ by more than {tolerance} "
            f"(first: {failed[0].sample}, {failed[0].layer}, {failed[0].relative_difference:.3e}); "
            "the cache does not hold this target's states"
        )
    print(f"{cache}: {min(samples, len(opened))} samples recomputed, all within {tolerance}")


def compare(cache: HiddenStateCache, target: Target, num_samples: int, seed: int) -> Iterator[Comparison]:
    """Recomputes randomly drawn samples, one forward each."""
    generator = torch.Generator().manual_seed(seed)
    chosen = torch.randperm(len(cache), generator=generator)[:num_samples].tolist()
    identity = cache.manifest.identity
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
