"""How often rounding changes a sampled reply, and what a draw costs: waiting times by token, against the cumulative sums of before.

    python benchmarks/sampling_noise.py [--data ../shared/data] [--out FILE.md] [--tokens 200] [--threads 1]

Every target decodes the same prompts at T = 1 in three ways: plainly in one batch, plainly one prompt at a time, and in a batch with trees
that an LM of the same weights drafts. Each way should give the same tokens. Where it first does not, rounding has changed a draw, and the
rest of that reply is not compared. The rate is first differences over compared tokens. The draw of before (`cumulative_draw`) runs on the
same targets and prompts; both are timed in turns. Random targets have a tiny trunk and a head as large as the vocabulary.
"""

from __future__ import annotations

import argparse
import itertools
import math
import os
import platform
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from draftsmith.decode import Engine, GenerationSettings, sampling
from draftsmith.decode.command import prompt_ids
from draftsmith.embedded.problems import distinct_problems
from draftsmith.models import LMDrafter, Target, load_tokenizer
from draftsmith.models.noise import draw_at, keys_at, uniforms
from draftsmith.models.shapes import parse_shape

SHAPE = "2x3"
QUESTIONS = (
    "Tell me a story about a small dog.",
    "What is the capital of France?",
    "Write a short poem about rain.",
    "How do I make pancakes?",
    "Why is the sky blue?",
    "Give me three ideas for a weekend.",
    "Explain what a river is to a child.",
    "Who are you?",
)
DRAWS: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]]


def cumulative_draw(logits_BNV: Tensor, keys_BP: Tensor, place_BN: Tensor) -> Tensor:
    """int64 [B, N]: the draw of before, by one uniform a position: the first token whose cumulative probability is above it."""
    cumulative_BNV = logits_BNV.softmax(-1).cumsum(-1, dtype=torch.float64)
    threshold_BN1 = uniforms(keys_BP).gather(1, place_BN)[..., None] * cumulative_BNV[..., -1:]
    return (
        torch.searchsorted(cumulative_BNV, threshold_BN1, right=True).squeeze(-1).clamp_(max=logits_BNV.shape[-1] - 1)
    )


DRAWS = {"waiting times": draw_at, "cumulative sums": cumulative_draw}


@contextmanager
def drawing_by(name: str) -> Iterator[None]:
    """Lets the engine draw in one of the two ways."""
    sampling.draw_at = DRAWS[name]
    try:
        yield
    finally:
        sampling.draw_at = draw_at


@dataclass(frozen=True)
class Subject:
    """A target, its prompts, and how long the replies are."""

    name: str
    target: Target
    prompts: list[list[int]]
    num_tokens: int


@dataclass(frozen=True)
class Compared:
    """Replies of another way of decoding against plain ones of the batch."""

    num_replies: int
    num_changed: int
    num_tokens: int

    @property
    def per_thousand(self) -> float:
        """First differences over a thousand compared tokens."""
        return 1000 * self.num_changed / self.num_tokens

    def __str__(self) -> str:
        return f"{self.per_thousand:.2f} ({self.num_changed} of {self.num_replies} replies)"


def compare(one: list[list[int]], other: list[list[int]]) -> Compared:
    """Where replies first differ; what is behind that place does not count."""
    places = [
        next((place for place, (a, b) in enumerate(zip(left, right, strict=True)) if a != b), None)
        for left, right in zip(one, other, strict=True)
    ]
    tokens = sum(len(reply) if place is None else place + 1 for reply, place in zip(one, places, strict=True))
    return Compared(len(one), sum(place is not None for place in places), tokens)


def measure(subject: Subject) -> tuple[Compared, Compared]:
    """Trees against plain decoding, and one prompt at a time against the batch."""
    settings = GenerationSettings(subject.num_tokens, temperature=1.0, seed=1)
    plain = Engine(subject.target)
    drafting = Engine(subject.target, LMDrafter(subject.target), parse_shape(SHAPE))
    batch = [reply.token_ids for reply in plain.generate(subject.prompts, settings)]
    trees = [reply.token_ids for reply in drafting.generate(subject.prompts, settings)]
    alone = [
        plain.generate([prompt], settings, request_ids=[number])[0].token_ids
        for number, prompt in enumerate(subject.prompts)
    ]
    return compare(batch, trees), compare(batch, alone)


def random_target(vocab_size: int, dtype: torch.dtype) -> Target:
    """A trunk of one layer, and a head that makes logits of a standard deviation of about 3."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=vocab_size, hidden_size=64, intermediate_size=64, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=2048, tie_word_embeddings=False, eos_token_id=None, bos_token_id=None,
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(0.0, 1 / math.sqrt(64))
        model.lm_head.weight.mul_(3.0)
    return Target.from_model(model.to(dtype), name=f"random, V = {vocab_size:,}")


def subjects(data: Path | None, dtype: str, num_tokens: int) -> Iterator[Subject]:
    """The embedded target, chat-6m where there is one, and random ones with large vocabularies."""
    named = {"embedded:target": [problem.question for problem in distinct_problems("test", 8, seed=0)]}
    if data is not None and (data / "models/chat-6m").is_dir():
        named[str(data / "models/chat-6m")] = list(QUESTIONS)
    for path, texts in named.items():
        target, tokenizer = Target.load(path, dtype=dtype), load_tokenizer(path)
        context = target.max_positions or 2**30
        prompts = [prompt_ids(tokenizer, text, chat=True) for text in texts] * 2
        room = context - max(map(len, prompts))
        yield Subject(f"{Path(path).name} (V = {target.ends.vocab_size:,})", target, prompts, min(num_tokens, room))
    for vocab_size in (2**15, 2**17):
        target = random_target(vocab_size, getattr(torch, dtype))
        generator = torch.Generator().manual_seed(1)
        prompts = [torch.randint(vocab_size, (4 + number,), generator=generator).tolist() for number in range(8)]
        yield Subject(target.name, target, prompts, num_tokens)


def milliseconds(rounds: int) -> Iterator[tuple[int, int, dict[str, float]]]:
    """Vocabulary, nodes, and the median time of each draw, taken in turns: one node, and a tree of 32 nodes of depth 5."""
    for vocab_size, num_nodes in itertools.product((2**11, 2**15, 2**17), (1, 32)):
        places = min(num_nodes, 6)
        logits = torch.randn(1, num_nodes, vocab_size) * 3
        keys, place = keys_at(torch.tensor([[7]]), torch.arange(places)), torch.arange(num_nodes)[None] % places
        times: dict[str, list[float]] = {name: [] for name in DRAWS}
        for _ in range(rounds + 1):
            for name, draw in DRAWS.items():
                start = time.perf_counter()
                draw(logits, keys, place)
                times[name].append(1000 * (time.perf_counter() - start))
        yield vocab_size, num_nodes, {name: statistics.median(own[1:]) for name, own in times.items()}


def report(arguments: argparse.Namespace) -> Iterator[str]:
    """The page, line by line, as it is measured."""
    cores, load = os.cpu_count(), os.getloadavg()[0]
    yield f"`python benchmarks/sampling_noise.py --tokens {arguments.tokens}`"
    yield ""
    yield f"{platform.processor() or platform.machine()}, {cores} cores, torch {torch.__version__}; load at the start {load:.1f}."
    yield ""
    yield "First differences per 1,000 tokens at T = 1:"
    yield ""
    yield "| target | dtype | draw | trees against plain | alone against in a batch |"
    yield "|---|---|---|---|---|"
    for dtype in ("float32", "bfloat16"):
        for subject in subjects(arguments.data, dtype, arguments.tokens):
            for name in DRAWS:
                with drawing_by(name):
                    trees, alone = measure(subject)
                yield f"| {subject.name} | {dtype} | {name} | {trees} | {alone} |"
    yield ""
    yield "Milliseconds a draw, median of rounds in turns:"
    yield ""
    yield "| V | nodes | waiting times | cumulative sums |"
    yield "|---|---|---|---|"
    for vocab_size, num_nodes, times in milliseconds(arguments.rounds):
        yield f"| {vocab_size:,} | {num_nodes} | {times['waiting times']:.2f} | {times['cumulative sums']:.2f} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--tokens", type=int, default=200)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    lines = []
    for line in report(arguments):
        print(line, flush=True)
        lines.append(line)
    if arguments.out is not None:
        arguments.out.write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
