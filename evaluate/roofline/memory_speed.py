"""How fast this machine moves memory, measured within a fraction of a second.

Owns the measurement. Does not know what decoding reads.
"""

import time
from dataclasses import dataclass
from pathlib import Path

import torch

CPU_CACHES = Path("/sys/devices/system/cpu/cpu0/cache")
LEAST, MOST = 2**27, 2**30  # bytes of a copied buffer


@dataclass(frozen=True)
class MemorySpeed:
    """What memory allows on one device.

    Attributes:
        bandwidth: bytes a second, read and written, of a plain copy.
        caches: bytes of the largest cache of the processor; None where it is unknown.
        threads: that copied; decoding uses as many. 0 on a GPU.
    """

    bandwidth: float
    caches: int | None = None
    threads: int = 0


def memory_speed(device: torch.device, repeats: int = 5) -> MemorySpeed:
    """Measure the copy bandwidth of a device: the fastest of a few copies of a buffer that is much larger than the caches.

    Args:
        device: of the target. On a CPU, the copy uses the threads that decoding uses.
        repeats: copies, after one that is not timed.
    """
    caches = cache_size(device)
    source = torch.ones(_buffer_bytes(device, caches) // 4, dtype=torch.float32, device=device)
    copy = torch.empty_like(source)
    fastest = float("inf")
    for repeat in range(repeats + 1):
        started = _now(device)
        copy.copy_(source)
        if repeat:
            fastest = min(fastest, _now(device) - started)
    threads = torch.get_num_threads() if device.type == "cpu" else 0
    return MemorySpeed(2 * source.numel() * source.element_size() / fastest, caches, threads)


def _buffer_bytes(device: torch.device, caches: int | None) -> int:
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return max(2**20, min(MOST, free // 4))
    return min(MOST, max(LEAST, 4 * (caches or 0)))


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def cache_size(device: torch.device, folder: Path = CPU_CACHES) -> int | None:
    """Bytes of the largest cache of a device, as the driver or Linux names it; None where neither does.

    Args:
        device: of the target.
        folder: where Linux describes the caches of the first core.
    """
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).L2_cache_size)
    sizes = [path.read_text().strip() for path in folder.glob("index*/size")] if device.type == "cpu" else []
    units = {"K": 2**10, "M": 2**20, "G": 2**30}
    return max((int(size[:-1]) * units[size[-1]] for size in sizes if size[-1:] in units), default=None)
