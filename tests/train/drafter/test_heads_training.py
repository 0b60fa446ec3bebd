"""Training draft heads: every network learns, alone or from what it learned before."""

from pathlib import Path
from typing import Any

import pytest
from training import KeepLosses, MakeCache, make_module, make_trainer

from draftsmith.models.families.heads import HeadsFamily
from draftsmith.train.batches.data_module import CacheDataModule

RECIPES: dict[str, tuple[HeadsFamily, dict[str, Any]]] = {
    "medusa, 25 tokens": (HeadsFamily(draft_vocab_size=25), {"distillation": "path"}),
    "blockwise": (HeadsFamily("blockwise", rank=0), {"distillation": "path"}),
    "hydra": (HeadsFamily("hydra", "per_step"), {"distillation": "path"}),
    "mlp": (HeadsFamily("mlp", inner_size=24), {}),
}


@pytest.fixture(scope="module")
def cache(make_cache: MakeCache) -> Path:
    return make_cache([12] * 40)


@pytest.mark.parametrize("recipe", RECIPES)
def test_every_network_learns(target_dir: Path, cache: Path, tmp_path: Path, recipe: str) -> None:
    family, settings = RECIPES[recipe]
    module = make_module(target_dir, drafter=family, lr=1e-2, **settings)
    losses: list[float] = []
    trainer = make_trainer(tmp_path, max_epochs=4, callbacks=[KeepLosses(losses)])
    trainer.fit(module, CacheDataModule(cache, tokens_per_batch=60))
    assert sum(losses[-8:]) < 0.8 * sum(losses[:8])
    assert "val/step2/top1" in trainer.callback_metrics
