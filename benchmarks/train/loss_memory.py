"""Resident memory of the head losses at a vocabulary of 128k, as the sequence grows: it should not.

    python -m benchmarks.train.loss_memory

Each length runs in a process of its own. `peak` is the process's largest resident size less its size before the loss;
`all logits` is what the logits alone of an unchunked loss would take. Memory that grows with the length is the head's
inputs and their gradient, which any loss has.
"""

import argparse
import resource
import subprocess
import sys

import torch

from draftsmith.train.losses import TeacherLogits, head_cross_entropy, head_distillation
from draftsmith.train.losses.chunk_rows import default_chunk_rows

VOCAB, WIDTH, STEPS = 128 * 1024, 32, 2


def resident_mib() -> float:
    """Largest resident size of this process so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def run(kind: str, length: int) -> None:
    """One forward and backward; prints the memory that it added, in MiB."""
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(STEPS, length, WIDTH, generator=generator).requires_grad_()
    weight = torch.randn(VOCAB, WIDTH, generator=generator).requires_grad_()
    targets = torch.randint(0, VOCAB, (length, STEPS), generator=generator)
    valid, step_weights = torch.ones(length, STEPS, dtype=torch.bool), torch.ones(STEPS)
    states, rows = (
        torch.randn(length + STEPS, WIDTH, generator=generator),
        torch.arange(length)[:, None] + torch.arange(STEPS),
    )
    before = resident_mib()
    if kind == "cross_entropy":
        sums = head_cross_entropy(inputs, weight, targets, valid, step_weights, metrics=False)
    else:
        head = weight.detach()
        teacher = lambda ids: TeacherLogits(states[ids] @ head.T)  # noqa: E731
        sums = head_distillation(inputs, weight, teacher, rows, targets, valid, step_weights, metrics=False)
    sums.total.backward()
    print(resident_mib() - before)


def main() -> None:
    """Prints the table, or with two arguments measures one row of it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--one", nargs=2, metavar=("KIND", "LENGTH"), help=argparse.SUPPRESS)
    parser.add_argument("--lengths", type=int, nargs="+", default=[1024, 4096, 16384])
    options = parser.parse_args()
    if options.one:
        run(options.one[0], int(options.one[1]))
        return
    print(f"V = {VOCAB}, E = {WIDTH}, K = {STEPS}, float32, chunks of {default_chunk_rows(VOCAB)} rows")
    print("| loss | tokens | peak, MiB | all logits, MiB |\n|---|---|---|---|")
    for kind in ("cross_entropy", "distillation"):
        for length in options.lengths:
            command = [sys.executable, __file__, "--one", kind, str(length)]
            peak = float(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
            print(f"| {kind} | {length} | {peak:.0f} | {STEPS * length * VOCAB * 4 / 2**20:.0f} |", flush=True)


if __name__ == "__main__":
    main()
