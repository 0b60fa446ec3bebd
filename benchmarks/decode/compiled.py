"""What compiling a cycle gains on a CPU, and what the compilation costs.

    python -m benchmarks.decode.compiled [--target embedded:target] [--drafters runs/quickstart/drafter@4x5n11] [--tokens 96] [--rounds 6]

Plain decoding and every drafter decode the same prompt op by op and compiled. Both take turns, and the fastest round of each counts. The
first use, which compiles, is timed apart. The tokens must be the same.
"""

from __future__ import annotations

import argparse
import shlex
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from benchmarks.machine import machine_line
from draftsmith.decode import Engine, GenerationSettings
from draftsmith.models import Target, load_tokenizer
from draftsmith.models.drafters.drafter_folder import load_drafter
from draftsmith.models.drafters.other_layouts import TargetBond
from draftsmith.models.files.fingerprint import tokenizer_fingerprint
from draftsmith.models.tree.shapes import parse_shape

WAYS: tuple[Literal["off", "on"], ...] = ("off", "on")
PROMPT = "Tom has 3 bags of 4 apples. How many apples does he have?"


@dataclass(frozen=True)
class Pace:
    """How fast one way of running was.

    Attributes:
        cycle_ms: of the fastest round.
        first_s: the first use, compilation included.
    """

    cycle_ms: float
    first_s: float


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.decode.compiled", description=__doc__)
    parser.add_argument("--target", default="embedded:target")
    parser.add_argument("--drafters", nargs="*", default=[], help="FOLDER@SHAPE, each decoded beside plain decoding")
    parser.add_argument("--tokens", type=int, default=96)
    parser.add_argument("--rounds", type=int, default=6)
    options = parser.parse_args(arguments)
    options.words = list(sys.argv[1:] if arguments is None else arguments)
    return options


def paces(engines: dict[Literal["off", "on"], Engine], prompt: list[int], tokens: int, rounds: int) -> list[Pace]:
    """Time both ways in turns.

    Args:
        engines: one for each way.
        prompt: token ids.
        tokens: to decode in a round.
        rounds: timed, behind the first use.

    Raises:
        RuntimeError: the two emit different tokens.
    """
    settings = GenerationSettings(max_new_tokens=tokens)
    first, best, texts = dict.fromkeys(WAYS, 0.0), dict.fromkeys(WAYS, float("inf")), {}
    for number in range(rounds + 1):
        for way, engine in engines.items():
            started = time.perf_counter()
            reply = engine.generate([prompt], settings)[0]
            seconds = time.perf_counter() - started
            texts[way] = reply.token_ids
            if number == 0:
                first[way] = seconds
            else:
                best[way] = min(best[way], seconds / (1 + len(reply.accepted)))
    if texts["off"] != texts["on"]:
        raise RuntimeError("compiled and not compiled, the engine emitted different tokens")
    return [Pace(best[way] * 1e3, first[way]) for way in WAYS]


def report(options: argparse.Namespace) -> Iterator[str]:
    """The page, line by line."""
    yield f"`{shlex.join(['python', '-m', 'benchmarks.decode.compiled', *options.words])}`"
    yield ""
    yield (
        f"{machine_line()}. "
        f"{options.tokens} tokens of one prompt, float32; the fastest of {options.rounds} rounds, ways in turns."
    )
    yield ""
    yield "| drafter | op by op, ms a cycle | compiled, ms a cycle | gain | first use, op by op | first use, compiled |"
    yield "|---|---|---|---|---|---|"
    target, tokenizer = Target.load(options.target), load_tokenizer(options.target)
    target.merge()
    prompt = tokenizer(PROMPT)["input_ids"]
    bond = TargetBond(target.ends, tokenizer_fingerprint(tokenizer))
    for name in ["plain", *options.drafters]:
        folder, _, shape = name.rpartition("@")
        drafter = load_drafter(Path(folder), target=bond) if folder else None
        limits = parse_shape(shape) if folder else None
        off, on = paces(
            {way: Engine(target, drafter, limits, compile=way) for way in WAYS}, prompt, options.tokens, options.rounds
        )
        yield (
            f"| {name} | {off.cycle_ms:.2f} | {on.cycle_ms:.2f} | {off.cycle_ms / on.cycle_ms:.2f} | {off.first_s:.1f} s | "
            f"{on.first_s:.1f} s |"
        )


if __name__ == "__main__":
    for line in report(parse()):
        print(line, flush=True)
