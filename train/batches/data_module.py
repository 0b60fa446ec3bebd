"""Batches for training drafters, read from a hidden-state cache.

Owns: the loaders, where in an epoch a run resumes, counts of labelled tokens. Does not know: drafters, losses, how a cache is laid out,
which samples are held out (`held_out.py`), how batches are planned (`batch_plan.py`).
"""

from __future__ import annotations

import threading
from fractions import Fraction
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytorch_lightning as pl
import torch
from pytorch_lightning.utilities import rank_zero_info
from torch import Tensor
from torch.utils.data import DataLoader

from draftsmith.data.cache.reader import HiddenStateCache
from draftsmith.data.progress import progress
from draftsmith.data.remote.remote_folder import location
from draftsmith.train.batches.batch_plan import plan_epoch, steps_differ
from draftsmith.train.batches.cache_subset import CacheSubset, check_same_origin
from draftsmith.train.batches.epoch_order import Buckets, Windows
from draftsmith.train.batches.epoch_sampler import EpochSampler
from draftsmith.train.batches.held_out import num_held_out, split_order
from draftsmith.train.batches.look_ahead import LookAheadLoader, placed
from draftsmith.train.batches.resumed import check_same, saved_place

Shuffle = Literal["full", "windowed"]
Batching = Literal["packed", "bucketed"]
# A window that is read, the next one on its way, two before that workers may still hold, and two of held-out samples.
_WINDOWS_AT_ONCE = 6


class CacheDataModule(pl.LightningDataModule):
    """Training and validation batches of a hidden-state cache.

    A run resumes in the middle of an epoch, with any number of processes. The joint batch of a step stays the same: `tokens_per_batch`
    times the processes of the interrupted run. So every step has the same samples, whatever the number of processes. Two things differ.
    Each process adds up its own share first, so float sums may differ in their last digits. And what a drafter draws at random in training
    belongs to a process.

    Args:
        cache: folder that `draftsmith data extract` wrote, or the URL it was copied to (`s3://...`, `gs://...`, any that
            fsspec knows), whose shards are fetched as they are needed.
        val_cache: a second cache for validation; without one, `val_fraction` of the samples of `cache` is held out.
        val_fraction: the share held out, at least one sample; used only without `val_cache`. A run that reads
            shard by shard holds out whole shards, if there are two or more, and prints how many samples that is.
        tokens_per_batch: tokens of a batch on each process, prompt tokens included, on average over batches.
        max_samples: train on no more than so many samples (the same ones under the same seed).
        shuffle: a new order every epoch. `full`: any sample anywhere. `windowed`: shards in random order, samples shuffled
            within `window_shards` of them. true takes `full` for a folder and `windowed` behind a URL.
        seed: fixes the held-out samples and every epoch's order.
        num_workers: processes that read ahead; 0 reads in the training process.
        check: when the shards' sha256 are compared. `open`: at the start, by one process of each node. `lazy`: by each process, before it
            first reads a shard. `off`: never, for caches of terabytes that `draftsmith data verify` has checked. Behind a URL, `open`
            means `lazy`.
        window_shards: shards of a window, or more where a step has more tokens.
        batching: `packed`: samples end to end. `bucketed`: samples of similar length, each padded to the longest.
        pad_to: padded lengths are a multiple of it, with `bucketed`.
        shard_cache: folder of this node for fetched shards; null: `draftsmith/shards` in XDG_CACHE_HOME or ~/.cache, which nobody else
            may write in.
        shard_cache_gib: how much it may hold.
        look_ahead: read, pack and copy the next batch in a thread while a step runs. null does so on CUDA. The batches are the same.

    Raises:
        ValueError: a cache that is missing, unfinished or altered; settings that leave nothing to train on or do not work together.
    """

    def __init__(
        self,
        cache: str | Path,
        val_cache: str | Path | None = None,
        val_fraction: float = 0.02,
        tokens_per_batch: int = 4096,
        max_samples: int | None = None,
        shuffle: bool | Shuffle = True,
        seed: int = 0,
        num_workers: int = 0,
        check: Literal["open", "lazy", "off"] = "open",
        window_shards: int = 32,
        batching: Batching = "packed",
        pad_to: int = 64,
        shard_cache: Path | None = None,
        shard_cache_gib: float = 50.0,
        look_ahead: bool | None = None,
    ) -> None:
        super().__init__()
        if val_cache is None and not 0.0 <= val_fraction < 1.0:
            raise ValueError(f"val_fraction is {val_fraction}; it must be at least 0 and below 1")
        for name, value in {"max_samples": max_samples, "window_shards": window_shards, "pad_to": pad_to}.items():
            if value is not None and value < 1:
                raise ValueError(
                    f"{name} is {value}; it must be at least 1{', or null for all' * (name == 'max_samples')}"
                )
        self.cache_path = location(cache)
        self.val_cache_path = None if val_cache is None else location(val_cache)
        if shuffle == "full" and isinstance(self.cache_path, str):
            raise ValueError(
                f"shuffle 'full' would fetch a whole shard of {self.cache_path} for every sample; use 'windowed' with a larger "
                "window_shards, or copy the cache to a local disk"
            )
        self.val_fraction, self.max_samples = val_fraction, max_samples
        self.tokens_per_batch, self.shuffle, self.seed = tokens_per_batch, shuffle, seed
        self.num_workers, self.check = num_workers, check
        self.window_shards, self.batching, self.pad_to = window_shards, batching, pad_to
        self.shard_cache, self.shard_cache_gib = shard_cache, shard_cache_gib
        self.look_ahead = look_ahead
        self.cache: HiddenStateCache | None = None
        self.train_set: CacheSubset | None = None
        self.val_set: CacheSubset | None = None
        self._epoch, self._start, self._keep_open = 0, 0, 0
        self._checked = False
        # Set on resume with another number of processes: tokens of a step over all of them.
        self._joint_tokens: int | None = None

    def prepare_data(self) -> None:
        """With check `open`, compares all shards. Lightning calls this in one process of each node, and the others wait."""
        if self.check == "open":
            for path in (self.cache_path, self.val_cache_path):
                if path is not None:
                    self._open(path).close()
        self._checked = True

    def setup(self, stage: str = "fit") -> None:
        """Opens the caches and divides the samples.

        Raises:
            ValueError: a cache that cannot be used, or no sample left to train on.
        """
        if self.train_set is not None:
            return
        # Made here: a strategy may send this module to processes that it spawns, and locks cannot be sent.
        self._reading = threading.Lock()
        self.cache = self._open(self.cache_path)
        order = split_order(self.cache, self.seed, self._by_shard)
        if self.val_cache_path is not None:
            val_cache = self._open(self.val_cache_path)
            check_same_origin(self.cache, val_cache)
            self.val_set = CacheSubset(val_cache, np.arange(len(val_cache)), self._padding)
        elif self.val_fraction > 0:
            held_out = num_held_out(self.cache, order, self.val_fraction, self._by_shard)
            self.val_set = CacheSubset(self.cache, np.sort(order[:held_out]), self._padding)
            order = order[held_out:]
        order = order if self.max_samples is None else order[: self.max_samples]
        if not len(order):
            raise ValueError(
                f"{self.cache_path} has {len(self.cache)} sample(s): none is left to train on; add samples"
            )
        self.train_set = CacheSubset(self.cache, np.sort(order), self._padding)

    def teardown(self, stage: str) -> None:
        """Ends what is fetched ahead."""
        for subset in (self.train_set, self.val_set):
            if subset is not None:
                subset.cache.close()

    def read_layers(self, layers: tuple[str, ...]) -> None:
        """Read only these layers of the caches; all of them unless this is called."""
        for subset in (self.train_set, self.val_set):
            if subset is not None:
                subset.layers = layers

    def check_target(self, fingerprint: str, vocab_size: int) -> None:
        """Checks every open cache against a target and its vocabulary.

        Args:
            fingerprint: the target's.
            vocab_size: V, the target's.

        Raises:
            ValueError: as `HiddenStateCache.check_target`.
        """
        for subset in (self.train_set, self.val_set):
            if subset is not None:
                subset.cache.check_target(fingerprint, vocab_size=vocab_size)

    def open_cache(self) -> HiddenStateCache:
        """The training cache.

        Raises:
            ValueError: setup() has not run.
        """
        if self.cache is None:
            raise ValueError("the data module is not set up; call setup() first")
        return self.cache

    def token_counts(self, vocab_size: int) -> Tensor:
        """How often each token is labelled in the training samples: int64 [V]."""
        train = self._train()
        return _counts(train.cache, train.indices, vocab_size)

    def num_prompt_tokens(self) -> int:
        """Tokens of the training samples' cache that are not labelled, its held-out samples included."""
        manifest = self.open_cache().manifest
        return manifest.num_tokens - manifest.num_labelled

    def sampled_token_counts(self, vocab_size: int, most_samples: int) -> tuple[Tensor, int, int]:
        """As token_counts, for some of the samples: spread over a folder, the first ones behind a URL.

        Args:
            vocab_size: V, the target's.
            most_samples: count at most this many.

        Returns:
            the counts, int64 [V]; the number of samples counted; the number of samples.
        """
        train = self._train()
        counts, counted = _sampled_counts(train, vocab_size, most_samples)
        return counts, counted, len(train)

    def held_out_token_counts(self, vocab_size: int, most_samples: int) -> Tensor | None:
        """As sampled_token_counts, of the held-out samples: int64 [V], or None where nothing is held out.

        Args:
            vocab_size: V, the target's.
            most_samples: count at most this many.
        """
        return None if self.val_set is None else _sampled_counts(self.val_set, vocab_size, most_samples)[0]

    def val_prompts(self, num_prompts: int) -> list[list[int]]:
        """Prompts of the first held-out samples that have one: token ids up to the first labelled token.

        Args:
            num_prompts: at most this many.
        """
        prompts: list[list[int]] = []
        if self.val_set is None:
            return prompts
        for input_ids, loss_mask in self.val_set.cache.texts(self.val_set.indices):
            labelled = torch.nonzero(loss_mask).flatten()
            if len(labelled) and int(labelled[0]) > 0:
                prompts.append(input_ids[: int(labelled[0])].tolist())
            if len(prompts) == num_prompts:
                break
        return prompts

    def train_dataloader(self) -> Any:
        """Batches of this rank, from where a resumed run stopped."""
        loader = self._train_loader()
        return self._ahead_of_steps(loader, ahead=True) if self._looks_ahead() else loader

    def val_dataloader(self) -> Any:
        """Batches of the held-out samples in a fixed order; none when nothing is held out.

        Raises:
            ValueError: fewer held-out samples than processes.
        """
        loader = self._val_loader()
        if loader is None:
            return []
        # Not ahead: a training batch may be waiting with its states meanwhile.
        return self._ahead_of_steps(loader, ahead=False) if self._looks_ahead() else loader

    def _looks_ahead(self) -> bool:
        return self._device().type == "cuda" if self.look_ahead is None else self.look_ahead

    def _ahead_of_steps(self, loader: DataLoader, ahead: bool) -> LookAheadLoader:
        device = self._device()
        return LookAheadLoader(
            loader, partial(placed, device=device), ahead, device, threaded=True, reading=self._reading
        )

    def _device(self) -> torch.device:
        return torch.device("cpu") if self.trainer is None else self.trainer.strategy.root_device

    def _train_loader(self) -> DataLoader:
        return self._loader(self._train(), bool(self.shuffle), self._epoch, self._start)

    def _val_loader(self) -> DataLoader | None:
        if self.val_set is None:
            return None
        processes = self._world()[1]
        if len(self.val_set) < processes:
            raise ValueError(
                f"{len(self.val_set)} sample(s) are held out for validation, and each of {processes} processes needs one; raise "
                "val_fraction, set it to 0, or give val_cache more samples"
            )
        return self._loader(self.val_set, False, 0, 0)

    def state_dict(self) -> dict[str, Any]:
        """Where in the data the run is; saved in every checkpoint."""
        assert self.trainer is not None
        return saved_place(self.trainer, self._layout())

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Called on resume. With another number of processes, the tokens of a step stay what they were.

        Args:
            state_dict: from `state_dict` of the interrupted run.

        Raises:
            ValueError: the samples, their order or the batches differ from those of the interrupted run, or a step of this epoch has fewer
                samples than there are processes now.
        """
        own = self._layout()
        # Checkpoints of earlier versions know of no windows and no buckets, and no process count but their own.
        joint = state_dict["layout"]["tokens_per_batch"] * state_dict["layout"]["world_size"]
        before = {"windows": None, "buckets": None, "joint_tokens": joint, **state_dict["layout"]}
        same = own["joint_tokens"] == before["joint_tokens"]
        may_differ = {"world_size", "joint_tokens"} | ({"tokens_per_batch"} if same else set())
        compared = {name: value for name, value in own.items() if name not in may_differ}
        check_same(compared, before, "resume with the same data")
        self._epoch, self._start = divmod(state_dict["batches_done"], state_dict["batches_per_epoch"])
        self._joint_tokens = before["joint_tokens"]
        if before["world_size"] != own["world_size"]:
            self._check_steps(before["world_size"], own["world_size"], self._joint_tokens)

    def _check_steps(self, interrupted: int, now: int, joint: int) -> None:
        differing = self._first_other_step(Fraction(joint), interrupted, now)
        if differing is not None:
            raise ValueError(
                f"step {differing} of this epoch has too few samples to be the same for {now} processes as for {interrupted}; "
                f"resume with {interrupted}"
            )
        rank_zero_info(
            f"the run resumes with {now} instead of {interrupted} processes: a step keeps its samples and its {joint} tokens, "
            f"each process now takes {float(self._budget()):g} of them instead of {float(Fraction(joint, interrupted)):g}; sums "
            "may differ in their last digits"
        )

    def _first_other_step(self, joint: Fraction, interrupted: int, now: int) -> int | None:
        train = self._train()
        plans = [
            plan_epoch(
                train.lengths,
                joint / world_size,
                seed=self.seed,
                epoch=self._epoch,
                world_size=world_size,
                shuffle=bool(self.shuffle),
                windows=self._windows(train),
                buckets=self._buckets,
            )
            for world_size in (interrupted, now)
        ]
        return steps_differ(*plans)

    def _layout(self) -> dict[str, Any]:
        train = self._train()
        # Settings first: a message names the first difference, which should be the cause.
        return {
            "source": self.open_cache().manifest.identity.source,
            "seed": self.seed,
            "shuffle": bool(self.shuffle),
            "windows": self.window_shards if self._by_shard else None,
            "buckets": None if self._buckets is None else [self._buckets.pad_to, self._buckets.steps],
            "samples": len(train),
            "tokens": int(train.lengths.sum(dtype=np.int64)),
            "tokens_per_batch": self.tokens_per_batch,
            "world_size": self._world()[1],
            "joint_tokens": self._joint_tokens or self.tokens_per_batch * self._world()[1],
        }

    @property
    def _by_shard(self) -> bool:
        """Whether samples are read shard by shard."""
        return self.shuffle == "windowed" or isinstance(self.cache_path, str)

    @property
    def _padding(self) -> int | None:
        return self.pad_to if self.batching == "bucketed" else None

    @property
    def _buckets(self) -> Buckets | None:
        return Buckets(self.pad_to) if self.batching == "bucketed" else None

    def _windows(self, subset: CacheSubset) -> Windows | None:
        by_shard = self._by_shard or subset.cache.shards.fetches
        return Windows(subset.cache.shard_of[subset.indices], self.window_shards) if by_shard else None

    def _budget(self) -> int | Fraction:
        """Tokens of a batch on this process."""
        if self._joint_tokens is None:
            return self.tokens_per_batch
        share = Fraction(self._joint_tokens, self._world()[1])
        return int(share) if share.denominator == 1 else share

    def _open(self, path: Path | str) -> HiddenStateCache:
        first = self.trainer is None or self.trainer.local_rank == 0
        # Fetched shards may be another process's: each hashes them itself.
        done = isinstance(location(path), Path) and (self._checked or not first)
        check = "off" if self.check == "open" and done else self.check
        return HiddenStateCache(path, check=check, shard_cache=self.shard_cache, shard_cache_gib=self.shard_cache_gib)

    def _train(self) -> CacheSubset:
        self.open_cache()
        assert self.train_set is not None
        return self.train_set

    def _world(self) -> tuple[int, int]:
        trainer = self.trainer
        return (0, 1) if trainer is None else (trainer.global_rank, trainer.world_size)

    def _loader(self, subset: CacheSubset, shuffle: bool, epoch: int, start: int) -> DataLoader:
        rank, world_size = self._world()
        windows = self._windows(subset)
        sampler = EpochSampler(
            subset.lengths,
            self._budget(),
            seed=self.seed,
            shuffle=shuffle,
            rank=rank,
            world_size=world_size,
            epoch=epoch,
            start=start,
            windows=windows,
            buckets=self._buckets,
            need=partial(subset.cache.need, reader=subset) if subset.cache.shards.fetches else None,
        )
        if windows is not None and subset.cache.shards.fetches:
            self._check_room(subset, sampler)
        return DataLoader(
            subset,
            batch_size=None,
            sampler=sampler,
            num_workers=self.num_workers,
            persistent_workers=self.num_workers > 0,
        )

    def _check_room(self, subset: CacheSubset, sampler: EpochSampler) -> None:
        """Stops with an error where the node's folder is too small for the windows in use at a time."""
        records = subset.cache.manifest.shards
        windows = sampler.plan().windows
        largest = max(sum(records[shard].num_bytes for shard in window) for window in windows) / 2**30
        needed = min(_WINDOWS_AT_ONCE * largest, sum(record.num_bytes for record in records) / 2**30)
        # More would keep others from the room that they need; training and held-out samples may share the cache.
        self._keep_open = max(self._keep_open, 2 * max(map(len, windows)))
        subset.cache.keep_open = self._keep_open
        if needed > self.shard_cache_gib:
            raise ValueError(
                f"shard_cache_gib is {self.shard_cache_gib:g}, but windows of up to {largest:.3g} GiB need {needed:.3g} GiB; raise it, "
                "or lower window_shards or tokens_per_batch"
            )


def _sampled_counts(subset: CacheSubset, vocab_size: int, most_samples: int) -> tuple[Tensor, int]:
    """Labelled tokens of some samples, spread over a folder, the first ones behind a URL: int64 [V], and how many samples."""
    step = 1 if subset.cache.shards.fetches else -(-len(subset) // most_samples)
    indices = subset.indices[::step][:most_samples]
    return _counts(subset.cache, indices, vocab_size), len(indices)


def _counts(cache: HiddenStateCache, indices: np.ndarray, vocab_size: int) -> Tensor:
    counts = torch.zeros(vocab_size, dtype=torch.int64)
    with progress(f"count the tokens of {cache.path}", len(indices), "samples", brief=True) as advance:
        for input_ids, loss_mask in cache.texts(indices):
            labelled = input_ids[loss_mask]
            counts.scatter_add_(0, labelled, torch.ones_like(labelled))
            advance(1)
    return counts
