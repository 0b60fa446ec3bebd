"""How one process of an extraction gets states: from a target of its own, from its part of one, or from what an engine computed.

Owns: what an extraction was asked for, which kind of worker that takes, and which options go with it. Does not know: samples, how shards
are written (`extract.py`), the forward (`features.py`).
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

import torch

from draftsmith.data.cache.cache_folder import CacheFolder
from draftsmith.data.cache.engine_states import EngineOptions, open_source
from draftsmith.data.cache.features import features, features_of_engine, num_embeddings
from draftsmith.data.cache.sharded_extraction import Features, follow, leading, process_group
from draftsmith.data.chats.token_kinds import TrainedOn
from draftsmith.data.chats.tokenized_samples import sample_length
from draftsmith.data.shards.manifest import CacheIdentity
from draftsmith.data.shared_work import Share, ShareOptions
from draftsmith.files import exclusive
from draftsmith.models.files.device_and_dtype import as_dtype
from draftsmith.models.target.ends import TargetEnds
from draftsmith.models.target.options import PlacementOptions
from draftsmith.models.target.prompt_template import TemplateChoice
from draftsmith.models.target.sharding import load_sharded, sharded_over

StoredDtype = Literal["bfloat16", "float16", "float32", "float8_e4m3"]


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


@dataclass(frozen=True)
class Extraction:
    """What an extraction was asked for: the arguments of `extract`, with the target's place and dtype resolved.

    Attributes:
        target: path or hub id.
        source: the texts.
        out: the folder of the cache.
        split: the only one that is kept; None for all.
        storage: what the cache holds.
        target_dtype: what the target runs in.
        target_sharding: `tp` where all processes hold the target together.
        share: which part of the shards this process makes.
        where: where the target runs.
        rendering: the chat template.
        engine: states of a serving engine.
        trained_on: what of the assistant's turns is trained on.
    """

    target: str
    source: Path
    out: Path
    split: str | None
    storage: StorageOptions
    target_dtype: str
    target_sharding: Literal["none", "tp"]
    share: ShareOptions
    where: PlacementOptions
    rendering: TemplateChoice
    engine: EngineOptions
    trained_on: TrainedOn


@dataclass(frozen=True)
class Worker:
    """This process's part of the work.

    Attributes:
        share: which shards it makes.
        ends: the target's.
        compute: gives the states of some samples.
        check_layer: raises an error for a layer that the target does not have.
    """

    share: Share
    ends: TargetEnds
    compute: Features
    check_layer: Callable[[str], None]


def open_worker(asked: Extraction, stack: contextlib.ExitStack) -> Worker | None:
    """Load what computes states here, and claim this share of the cache.

    Args:
        asked: what the extraction was asked for.
        stack: holds the claim, and where processes hold the target together, their group.

    Returns:
        The worker; None where another process writes what this one has helped to compute.

    Raises:
        ValueError: options that do not go together, a target or states that cannot be had, or another process makes this share.
    """
    if asked.engine.states is not None:
        return _engine_worker(asked, stack)
    if asked.target_sharding == "tp":
        return _sharded_worker(asked, stack)
    share = asked.share.own()
    _claim(asked.out, share, stack)
    loaded = asked.where.load(asked.target, asked.target_dtype)
    return Worker(share, loaded.ends, partial(features, loaded), loaded.check_layer)


def _engine_worker(asked: Extraction, stack: contextlib.ExitStack) -> Worker:
    """A process that reads what an engine computed; of the target it loads the ends alone.

    Raises:
        ValueError: greedy tokens are asked for, which only the target itself can give; or as :func:`open_source`.
    """
    share, storage, where = asked.share.own(), asked.storage, asked.where
    if storage.local_horizon:
        raise ValueError(
            f"local_horizon is {storage.local_horizon}, but an engine's states hold no greedy continuations; set it to 0, or "
            "leave --states out"
        )
    _claim(asked.out, share, stack)
    dtype = as_dtype(asked.target_dtype)
    ends = TargetEnds.load(
        asked.target, dtype, "cpu", where.revision, where.adapter, where.trust_remote_code, where.context
    )
    length = sample_length(storage.max_length, ends.max_positions, ends.name)
    source = open_source(asked.engine, ends, storage.layers, length)
    return Worker(share, ends, partial(features_of_engine, source), lambda _: None)


def _sharded_worker(asked: Extraction, stack: contextlib.ExitStack) -> Worker | None:
    """The first of the processes that hold a target together; in each of the others, None once the first one is done.

    Raises:
        ValueError: options that do not go with a target which processes hold together.
    """
    where, options = asked.where, vars(asked.share) | vars(asked.where)
    given = [
        name for name in ("rank", "world_size", "device_map", "adapter", "quantization") if options[name] is not None
    ]
    if given:
        raise ValueError(
            f"target_sharding tp divides the target's own weights among all processes of torchrun; {', '.join(given)} cannot be "
            "combined with it; leave that out, or set target_sharding to none"
        )
    own = asked.share.own()
    stack.enter_context(process_group())
    over, device = sharded_over("tp"), torch.device(where.device)
    loaded = load_sharded(
        asked.target, asked.target_dtype, over, device, where.revision, where.trust_remote_code, where.context
    )
    if own.rank > 0:
        follow(loaded, identity_of_forwards(loaded.ends, asked.storage))
        return None
    compute = stack.enter_context(leading(loaded))
    _claim(asked.out, Share(), stack)
    return Worker(Share(), loaded.ends, compute, loaded.check_layer)


def _claim(out: Path, share: Share, stack: contextlib.ExitStack) -> None:
    """Hold the right to make this share of the cache.

    Raises:
        ValueError: another process holds it, or the place is taken.
    """
    whole = out.absolute()  # "." has no name of its own
    stack.enter_context(exclusive(whole.with_name(whole.name + share.suffix)))
    CacheFolder(out).check_place()


def identity_of_forwards(ends: TargetEnds, storage: StorageOptions) -> CacheIdentity:
    """Give as much of an identity as forwards depend on: all of it that a process knows which reads no text.

    Args:
        ends: the target's.
        storage: what the cache holds.

    Returns:
        The identity, whose fields about texts are empty.
    """
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
