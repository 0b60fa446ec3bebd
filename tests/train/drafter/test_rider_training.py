"""Training riders: every kind learns through the frozen target, from a cache and with the target in the loop."""

from pathlib import Path
from typing import get_args

import pytest
from training import KeepLosses, MakeCache, make_module, make_trainer

from draftsmith.models.families.riders.rider_drafter import RiderFamily, RiderKind
from draftsmith.train.batches.data_module import CacheDataModule


@pytest.fixture(scope="module")
def cache(make_cache: MakeCache) -> Path:
    return make_cache([12] * 40)


@pytest.mark.parametrize("kind", get_args(RiderKind))
def test_every_kind_of_rider_learns_and_leaves_the_target_as_it_was(
    target_dir: Path, cache: Path, tmp_path: Path, kind: RiderKind
) -> None:
    module = make_module(target_dir, drafter=RiderFamily(riders=kind), lr=3e-2, distillation="path")
    losses: list[float] = []
    trainer = make_trainer(tmp_path, max_epochs=4, callbacks=[KeepLosses(losses)])
    trainer.fit(module, CacheDataModule(cache, tokens_per_batch=60))
    assert sum(losses[-8:]) < 0.9 * sum(losses[:8])
    assert module.ends.trunk is not None
    assert not any(weight.requires_grad for block in module.ends.trunk.blocks for weight in block.parameters())
