"""A cache of several shards."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from training import MakeCache

from draftsmith.data.cache.reader import HiddenStateCache
from draftsmith.data.shards.shards import ShardContent, write_shard
from draftsmith.models.target.target import PRE_NORM


@pytest.fixture(scope="module")
def in_shards(make_cache: MakeCache, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache of eight shards of five samples."""
    whole = HiddenStateCache(make_cache([7 + (5 * number) % 11 for number in range(40)]))
    folder = tmp_path_factory.mktemp("shards")
    manifest = replace(whole.manifest, shards=(), complete=False)
    for number in range(8):
        own = [whole[index] for index in range(5 * number, 5 * number + 5)]
        content = ShardContent(
            ids=[sample.id for sample in own],
            offsets=torch.tensor([0, *(len(sample.input_ids) for sample in own)]).cumsum(0),
            input_ids=torch.cat([sample.input_ids for sample in own]),
            loss_mask=torch.cat([sample.loss_mask for sample in own]),
            hidden={PRE_NORM: torch.cat([sample.hidden[PRE_NORM] for sample in own])},
            greedy_ids=None,
        )
        record = write_shard(folder / f"shard-{number:05d}.safetensors", content)
        manifest = manifest.with_shards((*manifest.shards, record))
    manifest.save(folder)
    return folder
