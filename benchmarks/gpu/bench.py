"""How close decoding and training come to what a GPU allows, in one run of under 8 minutes. No download.

    python -m benchmarks.gpu.bench                  # = make bench-gpu; needs one CUDA device
    python -m benchmarks.gpu.bench --scale tiny     # tries it out on a CPU

An 8B-shaped Llama with random weights decodes plainly and with random drafters. Each section writes OUT/DATE-gpu.json as it ends, so a
crash or the end of the time loses only the section that runs. A section that fails is noted with its error, and the next one runs. At the
end OUT/DATE-gpu.md says which goals are met.
"""

from __future__ import annotations

import argparse
import datetime
import gc
import json
import math
import shlex
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu import decode_sections, train_sections
from benchmarks.gpu.decode_sections import Bench
from benchmarks.gpu.goals import goals, page
from benchmarks.gpu.subject import SCALES
from draftsmith import provenance
from draftsmith.files import atomic_write

SECTIONS: dict[str, tuple[Callable[[Bench], dict[str, Any]], int]] = {
    "memory": (decode_sections.memory, 5),
    "plain": (decode_sections.plain, 45),
    "verify": (decode_sections.verify, 30),
    "cycles": (decode_sections.cycles, 60),
    "prefill": (decode_sections.prefill, 10),
    "rows": (decode_sections.rows, 45),
    "train": (train_sections.train, 45),
    "exact": (decode_sections.exact, 75),
    "runners": (decode_sections.all_runners, 120),
}
"""In the order of their worth, each with the seconds that it is expected to take at full scale."""


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; 0 where every section ended well, 1 where one failed, 2 without a GPU at full scale."""
    options = read_options(arguments)
    device = torch.device("cuda" if torch.cuda.is_available() and options.scale == "full" else "cpu")
    if options.scale == "full" and device.type != "cuda":
        print("there is no CUDA device here; try the benchmark out with --scale tiny", file=sys.stderr)
        return 2
    options.out.mkdir(parents=True, exist_ok=True)
    bench = Bench(SCALES[options.scale], device)
    report = empty_report(bench, sys.argv[1:] if arguments is None else arguments)
    stem = options.out / f"{datetime.date.today().isoformat()}-gpu"
    ends_at = time.perf_counter() + 60 * options.minutes
    for name in options.sections:
        report["sections"][name] = section(name, bench, ends_at - time.perf_counter())
        report["goals"] = [asdict(goal) for goal in goals(report["sections"])]
        atomic_write(stem.with_suffix(".json"), json.dumps(rounded(report), indent=1) + "\n")
        print(f"{name}: {json.dumps(rounded(report['sections'][name]))}", flush=True)
    atomic_write(stem.with_suffix(".md"), page(rounded(report)))
    print(stem.with_suffix(".md").read_text())
    return int(any("error" in figures for figures in report["sections"].values()))


def read_options(arguments: Sequence[str] | None) -> argparse.Namespace:
    """What the command line asks for.

    Raises:
        SystemExit: an option is wrong; the message says which.
    """
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu.bench", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--scale", choices=list(SCALES), default="full", help="tiny runs on a CPU, to try it out")
    parser.add_argument("--out", type=Path, help="folder; benchmarks/results/gpu, or runs/bench-gpu for tiny")
    parser.add_argument("--sections", nargs="+", choices=list(SECTIONS), default=list(SECTIONS), help="default: all")
    parser.add_argument("--minutes", type=float, default=8.0, help="sections that would not end in time are left out")
    options = parser.parse_args(arguments)
    default = "benchmarks/results/gpu" if options.scale == "full" else "runs/bench-gpu"
    options.out = options.out or Path(default)
    return options


def empty_report(bench: Bench, arguments: Sequence[str]) -> dict[str, Any]:
    """What every report says, before its sections."""
    facts = provenance.record(shlex.join(["python", "-m", "benchmarks.gpu.bench", *arguments]), {}, {})
    names = ("command", "time", "git_revision", "machine", "versions")
    return {name: facts[name] for name in names} | {
        "scale": bench.scale.name,
        "sizes": bench.scale.sizes,
        "device": torch.cuda.get_device_name() if bench.device.type == "cuda" else "cpu",
        "dtype": str(bench.dtype).removeprefix("torch."),
        "goals": [],
        "sections": {},
    }


def section(name: str, bench: Bench, seconds_left: float) -> dict[str, Any]:
    """Run one section: its figures with its seconds and its peak memory; or its error; or why it was left out."""
    measure, expected = SECTIONS[name]
    if seconds_left < (expected if bench.scale.name == "full" else 0):
        return {"skipped": f"{max(0.0, seconds_left):.0f} s were left, about {expected} s are needed"}
    on_gpu = bench.device.type == "cuda"
    started = time.perf_counter()
    try:
        if on_gpu:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        figures = measure(bench)
    except Exception as error:  # noqa: BLE001  (whatever stops one section must not lose the others)
        last = traceback.format_exc().strip().splitlines()[-6:]
        figures = {"error": f"{type(error).__name__}: {str(error)[:600]}", "at": last}
        gc.collect()
    figures["section_s"] = time.perf_counter() - started
    if on_gpu:
        figures["peak_gib"] = torch.cuda.max_memory_allocated() / 2**30
    return figures


def rounded(value: Any) -> Any:
    """Numbers with five digits; NaN and infinity, which JSON lacks, become null."""
    if isinstance(value, dict):
        return {key: rounded(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [rounded(inner) for inner in value]
    if isinstance(value, float):
        return float(f"{value:.5g}") if math.isfinite(value) else None
    return value


if __name__ == "__main__":
    sys.exit(main())
