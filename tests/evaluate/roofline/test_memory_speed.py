from pathlib import Path

import pytest
import torch

from draftsmith.evaluate.roofline.memory_speed import cache_size, memory_speed


def test_bandwidth_is_measured_with_the_threads_of_decoding() -> None:
    speed = memory_speed(torch.device("cpu"), repeats=1)
    assert speed.threads == torch.get_num_threads()
    assert 1e8 < speed.bandwidth < 1e13


def test_the_largest_cache_counts(tmp_path: Path) -> None:
    for number, size in enumerate(["32K", "1024K", "36M"]):
        (tmp_path / f"index{number}").mkdir()
        (tmp_path / f"index{number}" / "size").write_text(size + "\n")
    assert cache_size(torch.device("cpu"), tmp_path) == 36 * 2**20


def test_where_nothing_names_the_caches_their_size_is_unknown(tmp_path: Path) -> None:
    assert cache_size(torch.device("cpu"), tmp_path) is None


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_gpu_copies_faster_than_any_cpu() -> None:
    speed = memory_speed(torch.device("cuda"))
    assert speed.threads == 0
    assert speed.bandwidth > 1e11
    assert speed.caches
