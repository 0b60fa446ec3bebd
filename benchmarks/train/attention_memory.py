"""Time and memory of EAGLE's training attention on a CPU, forward and backward over all draft steps.

    python benchmarks/train/attention_memory.py

Each figure is of a process of its own. `seconds` is the processor's time. `held` is the process's largest resident size less its size
before, while glibc gives freed memory back at once; `resident` is the same as glibc does by default, which keeps much of it. Every token
but the last of each document is an anchor.
"""

import argparse
import os
import resource
import subprocess
import sys
import time

import torch

from draftsmith.models.slots.rollout_attention import RolloutAttention

HEADS, GROUPS, SIZE = 4, 4, 32
CASES = (("1x8192", 3), ("1x4096+32x128", 3), ("32x256", 3), ("16x256", 7), ("64x64", 7), ("256x32", 7))
"""Documents as COUNTxLENGTH, and draft steps."""


def run(documents: str, num_steps: int) -> None:
    """One forward and backward; prints the seconds and the MiB that they took."""
    pairs = [part.split("x") for part in documents.split("+")]
    lengths = [int(length) for count, length in pairs for _ in range(int(count))]
    document_ids = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    anchors = torch.nonzero(document_ids[1:] == document_ids[:-1]).squeeze(1)
    generator = torch.Generator().manual_seed(0)

    def rows(number: int, heads: int) -> torch.Tensor:
        return torch.randn(number, heads, SIZE, generator=generator).requires_grad_()

    positions = torch.cat([torch.arange(length) for length in lengths])
    keys, values = rows(len(positions), GROUPS), rows(len(positions), GROUPS)
    queries = [rows(len(anchors), HEADS) for _ in range(num_steps)]
    further = [(rows(len(anchors), GROUPS), rows(len(anchors), GROUPS)) for _ in range(num_steps - 1)]
    memory, seconds = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
    attention = RolloutAttention(document_ids, positions, anchors, keys, values, flexible=False)
    outputs = [attention(queries[step], further[:step]) for step in range(num_steps)]
    torch.stack(outputs).square().sum().backward()
    seconds = time.process_time() - seconds
    print(seconds, (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - memory) / 1024)


def main() -> None:
    """Prints the table, or with two arguments measures one row of it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--one", nargs=2, metavar=("DOCUMENTS", "STEPS"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        run(options.one[0], int(options.one[1]))
        return
    print("| documents | draft steps | seconds | held, MiB | resident, MiB |\n|---|---|---|---|---|", flush=True)
    for documents, num_steps in CASES:
        seconds, resident = measured(documents, num_steps)
        _, held = measured(documents, num_steps, MALLOC_MMAP_THRESHOLD_=str(1 << 20))
        print(f"| {documents} | {num_steps} | {seconds:.1f} | {held:.0f} | {resident:.0f} |", flush=True)


def measured(documents: str, num_steps: int, **variables: str) -> tuple[float, float]:
    """Seconds and MiB of one row, in a process with these environment variables."""
    command = [sys.executable, __file__, "--one", documents, str(num_steps)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=os.environ | variables)
    seconds, memory = done.stdout.split()
    return float(seconds), float(memory)


if __name__ == "__main__":
    main()
