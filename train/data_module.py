"""Batches for training drafters, read from a hidden-state cache.

Owns: the held-out share, the loaders, where a resumed run goes on, counts of labelled tokens. Does not know: drafters,
losses, how a cache is laid out.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import pytorch_lightning as pl
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from draftsmith.data.cache import HiddenStateCache
from draftsmith.data.packing import pack
from draftsmith.models.rollout import PackedBatch
from draftsmith.train.batch_plan import EpochSampler


class CacheBatch:
    """A packed batch and the ids of its samples.

    Deliberately no dataclass: Lightning's precision plugins would walk into one and cast its fields.
    """

    def __init__(self, packed: PackedBatch, sample_ids: tuple[str, ...]) -> None:
        self.packed = packed
        self.sample_ids = sample_ids

    @property
    def num_labelled(self) -> int:
        """Tokens that the loss is about (those of the assistant)."""
        return int(self.packed.loss_mask.sum())

    def to(self, device: torch.device | str, non_blocking: bool = False) -> CacheBatch:
        """The same batch on another device; Lightning calls this."""
        return CacheBatch(self.packed.to(device), self.sample_ids)


class CacheDataModule(pl.LightningDataModule):
    """Training and validation batches of a hidden-state cache.

    Args:
        cache: folder that `draftsmith data extract` wrote.
        val_cache: a second cache for validation; without one, `val_fraction` of the samples of `cache` is held out.
        val_fraction: the share held out, at least one sample; used only without `val_cache`.
        tokens_per_batch: tokens of a batch on each process, prompt tokens included, on average over batches.
        max_samples: train on no more than so many samples (the same ones under the same seed).
        shuffle: a new order every epoch.
        seed: fixes the held-out samples and every epoch's order.
        num_workers: processes that read ahead; 0 reads in the training process.
        check: when the shards' sha256 are compared: at `open`, `lazy` before first use, or `off`.

    Raises ValueError for a cache that is missing, unfinished or altered, and for settings that leave nothing to train
    on.
    """

    def __init__(
        self,
        cache: Path,
        val_cache: Path | None = None,
        val_fraction: float = 0.02,
        tokens_per_batch: int = 4096,
        max_samples: int | None = None,
        shuffle: bool = True,
        seed: int = 0,
        num_workers: int = 0,
        check: Literal["open", "lazy", "off"] = "open",
    ) -> None:
        super().__init__()
        if val_cache is None and not 0.0 <= val_fraction < 1.0:
            raise ValueError(f"val_fraction is {val_fraction}; it must be at least 0 and below 1")
        if max_samples is not None and max_samples < 1:
            raise ValueError(f"max_samples is {max_samples}; it must be at least 1, or null for all")
        self.cache_path, self.val_cache_path = Path(cache), None if val_cache is None else Path(val_cache)
        self.val_fraction, self.max_samples = val_fraction, max_samples
        self.tokens_per_batch, self.shuffle, self.seed = tokens_per_batch, shuffle, seed
        self.num_workers, self.check = num_workers, check
        self.cache: HiddenStateCache | None = None
        self.train_set: CacheSubset | None = None
        self.val_set: CacheSubset | None = None
        self._epoch, self._start = 0, 0

    def setup(self, stage: str = "fit") -> None:
        """Opens the caches and divides the samples."""
        if self.train_set is not None:
            return
        self.cache = HiddenStateCache(self.cache_path, check=self.check)
        order = torch.randperm(len(self.cache), generator=torch.Generator().manual_seed(self.seed)).tolist()
        if self.val_cache_path is not None:
            val_cache = HiddenStateCache(self.val_cache_path, check=self.check)
            _check_same_origin(self.cache, val_cache)
            self.val_set = CacheSubset(val_cache, list(range(len(val_cache))))
        elif self.val_fraction > 0:
            num_held_out = max(1, round(self.val_fraction * len(order)))
            self.val_set, order = CacheSubset(self.cache, sorted(order[:num_held_out])), order[num_held_out:]
        order = order if self.max_samples is None else order[: self.max_samples]
        if not order:
            raise ValueError(
                f"{self.cache_path} has {len(self.cache)} sample(s): none is left to train on; add samples"
            )
        self.train_set = CacheSubset(self.cache, sorted(order))

    def read_layers(self, layers: tuple[str, ...]) -> None:
        """Read only these layers of the caches; all of them unless this is called."""
        for subset in (self.train_set, self.val_set):
            if subset is not None:
                subset.layers = layers

    def open_cache(self) -> HiddenStateCache:
        """The training cache. Raises ValueError before setup()."""
        if self.cache is None:
            raise ValueError("the data module is not set up; call setup() first")
        return self.cache

    def token_counts(self, vocab_size: int) -> Tensor:
        """How often each token is labelled in the training samples: int64 [V]."""
        counts = torch.zeros(vocab_size, dtype=torch.int64)
        for index in range(len(self._train())):
            sample = self._train().sample(index)
            counts += torch.bincount(sample.input_ids[sample.loss_mask], minlength=vocab_size)
        return counts

    def val_prompts(self, num_prompts: int) -> list[list[int]]:
        """Token ids up to the first labelled one, of the first held-out samples that have a prompt."""
        prompts: list[list[int]] = []
        for index in range(0 if self.val_set is None else len(self.val_set)):
            if len(prompts) == num_prompts:
                break
            assert self.val_set is not None
            sample = self.val_set.sample(index)
            labelled = torch.nonzero(sample.loss_mask).flatten()
            if len(labelled) and int(labelled[0]) > 0:
                prompts.append(sample.input_ids[: int(labelled[0])].tolist())
        return prompts

    def train_dataloader(self) -> DataLoader:
        """Batches of this rank, from where a resumed run stopped."""
        return self._loader(self._train(), self.shuffle, self._epoch, self._start)

    def val_dataloader(self) -> DataLoader | list:
        """Batches of the held-out samples in a fixed order; none when nothing is held out."""
        return [] if self.val_set is None else self._loader(self.val_set, False, 0, 0)

    def state_dict(self) -> dict[str, Any]:
        """Where in the data the run is; saved in every checkpoint."""
        assert self.trainer is not None
        return {
            "batches_done": self.trainer.fit_loop.epoch_loop.batch_progress.total.processed,  # type: ignore[attr-defined]
            "batches_per_epoch": self.trainer.num_training_batches,
            "layout": self._layout(),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Called on resume, before the loaders are made.

        Raises ValueError when the samples, their order or the batches differ from those of the interrupted run.
        """
        for name, value in self._layout().items():
            if state_dict["layout"][name] != value:
                raise ValueError(
                    f"the checkpoint was made with {name} = {state_dict['layout'][name]!r}, this run has {value!r}; "
                    "resume with the same data, or start a new run without --ckpt_path"
                )
        self._epoch, self._start = divmod(state_dict["batches_done"], state_dict["batches_per_epoch"])

    def _layout(self) -> dict[str, Any]:
        train = self._train()
        return {
            "source": self.open_cache().manifest.identity.source,
            "samples": len(train),
            "tokens": sum(train.lengths),
            "tokens_per_batch": self.tokens_per_batch,
            "shuffle": self.shuffle,
            "seed": self.seed,
            "world_size": self._world()[1],
        }

    def _train(self) -> CacheSubset:
        self.open_cache()
        assert self.train_set is not None
        return self.train_set

    def _world(self) -> tuple[int, int]:
        trainer = self.trainer
        return (0, 1) if trainer is None else (trainer.global_rank, trainer.world_size)

    def _loader(self, subset: CacheSubset, shuffle: bool, epoch: int, start: int) -> DataLoader:
        rank, world_size = self._world()
        sampler = EpochSampler(
            subset.lengths,
            self.tokens_per_batch,
            seed=self.seed,
            shuffle=shuffle,
            rank=rank,
            world_size=world_size,
            epoch=epoch,
            start=start,
        )
        return DataLoader(
            subset,
            batch_size=None,
            sampler=sampler,
            num_workers=self.num_workers,
            persistent_workers=self.num_workers > 0,
        )


class CacheSubset(Dataset):
    """Some samples of a cache; indexing with a list of numbers gives them packed."""

    def __init__(self, cache: HiddenStateCache, indices: Sequence[int]) -> None:
        self.cache, self.indices = cache, indices
        self.layers: tuple[str, ...] | None = None
        lengths = cache.sample_lengths
        self.lengths = [lengths[index] for index in indices]

    def __len__(self) -> int:
        return len(self.indices)

    def sample(self, number: int) -> Any:
        """One CachedSample."""
        return self.cache[self.indices[number]]

    def __getitem__(self, numbers: Sequence[int]) -> CacheBatch:
        samples = [self.sample(number) for number in numbers]
        return CacheBatch(pack(samples, self.layers), tuple(sample.id for sample in samples))


def _check_same_origin(cache: HiddenStateCache, val_cache: HiddenStateCache) -> None:
    val_cache.check_target(cache.manifest.identity.target_fingerprint)
    val_cache.check_tokenizer(cache.manifest.identity.tokenizer_fingerprint)
