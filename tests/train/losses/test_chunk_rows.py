"""How many rows of logits a loss holds: by vocabulary, by a GPU's free memory, or as the user says."""

from pathlib import Path
from typing import Any

import pytest
import torch
from training import KeepLosses, MakeCache, make_module, make_trainer

from draftsmith.train.batches.data_module import CacheDataModule
from draftsmith.train.losses import chunk_rows, chunked_head
from draftsmith.train.losses.chunk_rows import chosen_chunk_rows, default_chunk_rows, free_memory

GIB = 2**30


@pytest.mark.parametrize(
    ("vocabulary", "free_gib", "rows"),
    [
        (128_000, 64, 3328),
        (32_000, 64, 8192),  # more would only take memory
        (128_000, 20, 1024),
        (128_000, 1, 512),  # thinner chunks waste the machine
        (128_000, None, 512),
        (32_000, None, 512),
        (1_000, None, 1048),
        (100, None, 4096),
    ],
)
def test_rows_follow_from_vocabulary_and_free_memory(vocabulary: int, free_gib: int | None, rows: int) -> None:
    free = None if free_gib is None else free_gib * GIB
    assert default_chunk_rows(vocabulary, free) == rows
    if free is not None and rows > 512:
        assert rows * vocabulary * 20 <= free / 8


def test_the_users_rows_win_and_a_cpu_leaves_the_choice_to_the_vocabulary(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu = torch.device("cpu")
    assert chosen_chunk_rows(None, 128_000, cpu) is None
    assert chosen_chunk_rows(7, 128_000, cpu) == 7
    monkeypatch.setattr(chunk_rows, "free_memory", lambda device: 64 * GIB)
    assert chosen_chunk_rows(None, 128_000, cpu) == 3328
    assert chosen_chunk_rows(7, 128_000, cpu) == 7


@pytest.mark.parametrize("distillation", ["none", "path"])
def test_a_run_takes_the_rows_that_fit_and_its_losses_change_by_rounding_only(
    target_dir: Path,
    make_cache: MakeCache,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    distillation: str,
) -> None:
    cache = make_cache([12] * 10)
    sizes: list[int] = []
    one_chunk = chunked_head._one_chunk

    def note(job: Any, chunk: Any, *args: Any) -> None:
        sizes.append(len(chunk.row_ids))
        one_chunk(job, chunk, *args)

    monkeypatch.setattr(chunked_head, "_one_chunk", note)

    def losses(**settings: int) -> tuple[list[float], int | None]:
        sizes.clear()
        noted: list[float] = []
        module = make_module(target_dir, distillation=distillation, **settings)
        data = CacheDataModule(cache, val_fraction=0, tokens_per_batch=60)
        make_trainer(tmp_path, max_epochs=3, callbacks=[KeepLosses(noted)]).fit(module, data)
        return noted, module.objective.chunk_rows

    by_vocabulary, none = losses()
    monkeypatch.setattr(chunk_rows, "free_memory", lambda device: 64 * GIB)
    by_memory, rows = losses()
    assert max(sizes) > 5
    by_hand, own = losses(chunk_rows=5)
    assert max(sizes) <= 5
    assert (none, rows, own) == (None, 8192, 5)
    assert by_memory == pytest.approx(by_vocabulary, rel=1e-5)
    assert by_hand == pytest.approx(by_vocabulary, rel=1e-5)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_memory_that_the_process_holds_unused_counts_as_free() -> None:
    device = torch.device("cuda", 0)
    before = free_memory(device)
    block = torch.empty(2**28, dtype=torch.uint8, device=device)
    during = free_memory(device)
    del block
    after = free_memory(device)
    assert before is not None
    assert during is not None
    assert after is not None
    assert during <= before - 2**28
    assert after >= during + 2**28
