"""How often rounding changes a sampled token, and what a draw costs: noise by token against cumulative sums, the draw of before.

    python -m benchmarks.decode.sampling_noise [--data ../shared/data] [--tokens 32] [--dtypes float32,bfloat16] [--threads 1]

Every target decodes the same prompts at T = 1 in three ways: plainly in one batch, plainly one prompt at a time, and in a batch with trees
that an LM of the same weights drafts. At each position the two ways compared have logits that differ by rounding alone. From such a pair
follows the exact chance, over all noise, that the draws differ; no noise is sampled for it, so a few hundred positions tell rates of one in
a million. Beside it stands how many replies did differ. Both draws are timed in turns on random logits.

Random targets have a tiny trunk and a head as large as the vocabulary.

Shape legend: B batch rows, N tree nodes, P positions that nodes compete for, V vocabulary.
"""

from __future__ import annotations

import argparse
import itertools
import math
import os
import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.machine import machine_line
from draftsmith.decode import Engine, GenerationSettings
from draftsmith.decode.batch import Batch
from draftsmith.decode.cycle import CycleReport, DecodeCycle
from draftsmith.decode.decode_command import prompt_ids
from draftsmith.decode.ledger import Ledger
from draftsmith.decode.verify.lossless import LosslessVerifier
from draftsmith.decode.verify.verifier import Reading, Walk
from draftsmith.embedded.problems import distinct_problems
from draftsmith.models import Drafter, DraftLimits, LMDrafter, Target, load_tokenizer
from draftsmith.models.tree.noise import draw_at, keys_at, uniforms
from draftsmith.models.tree.shapes import parse_shape

SHAPE = "2x3"
QUESTIONS = (
    "Tell me a story about a small dog.",
    "What is the capital of France?",
    "Write a short poem about rain.",
    "How do I make pancakes?",
    "Why is the sky blue?",
    "Give me three ideas for a weekend.",
)
Draw = Callable[[Tensor, Tensor, Tensor], Tensor]


def cumulative_draw(logits_BNV: Tensor, keys_BP: Tensor, place_BN: Tensor) -> Tensor:
    """int64 [B, N]: the draw of before, by one uniform a position: the first token whose cumulative probability is above it."""
    cumulative_BNV = logits_BNV.softmax(-1).cumsum(-1, dtype=torch.float64)
    threshold_BN1 = uniforms(keys_BP).gather(1, place_BN)[..., None] * cumulative_BNV[..., -1:]
    chosen_BN = torch.searchsorted(cumulative_BNV, threshold_BN1, right=True).squeeze(-1)
    return chosen_BN.clamp_(max=logits_BNV.shape[-1] - 1)


DRAWS: dict[str, Draw] = {"noise by token": draw_at, "cumulative sums": cumulative_draw}


def changed_by_token(first_V: Tensor, second_V: Tensor) -> float:
    """The chance that noise by token draws two tokens from two rows of logits.

    Both draw k with probability 1 / sum_j max(p_j / p_k, q_j / q_k). With q = p exp(d) that is p_k / (1 + S_k), where S_k is the sum of
    p_j (exp(d_j - d_k) - 1) over the tokens j whose d is above d_k.
    """
    log_p_V, log_q_V = first_V.double().log_softmax(-1), second_V.double().log_softmax(-1)
    shift_V, order_V = (log_q_V - log_p_V).sort(descending=True)
    p_V = log_p_V.exp()[order_V]
    # sum over j before k of p_j exp(d_j - d_k) - p_j; equal shifts add nothing either way.
    above_V = (p_V * shift_V.expm1()).cumsum(-1) - shift_V.expm1() * p_V.cumsum(-1)
    excess_V = (above_V * (-shift_V).exp()).clamp(min=0.0)
    return float((p_V * excess_V / (1.0 + excess_V)).sum())


def changed_by_sums(first_V: Tensor, second_V: Tensor) -> float:
    """The chance that one uniform falls into different tokens' shares: what the shares in the order of the vocabulary do not overlap."""
    ends = [logits_V.softmax(-1).cumsum(-1, dtype=torch.float64) for logits_V in (first_V, second_V)]
    p_ends_V, q_ends_V = (sums_V / sums_V[-1] for sums_V in ends)
    zero_1 = torch.zeros_like(p_ends_V[:1])
    starts_V = torch.maximum(torch.cat([zero_1, p_ends_V[:-1]]), torch.cat([zero_1, q_ends_V[:-1]]))
    return float(1.0 - (torch.minimum(p_ends_V, q_ends_V) - starts_V).clamp(min=0.0).sum())


class Recording:
    """Decodes, and keeps the target's processed logits of every emitted token but the first."""

    def __init__(self, target: Target, drafter: Drafter | None = None, limits: DraftLimits | None = None) -> None:
        self._kept: defaultdict[int, list[Tensor]] = defaultdict(list)
        self._engine = Engine(target, drafter, limits, runner=lambda cycle: RecordedCycle(cycle, self._kept))

    def kept_logits(self, prompts: list[list[int]], settings: GenerationSettings, first: int = 0) -> list[Kept]:
        """The replies, with the logits of their tokens."""
        self._kept.clear()
        replies = self._engine.generate(prompts, settings, request_ids=list(range(first, first + len(prompts))))
        return [Kept(reply.token_ids, self._kept[number]) for number, reply in enumerate(replies)]


class RecordedCycle:
    """Runs cycles op by op, and adds the logits at the nodes of each walk to those of its row's request."""

    runs_ahead = False

    def __init__(self, cycle: DecodeCycle, kept: defaultdict[int, list[Tensor]]) -> None:
        self._verifier, self._kept = KeptWalk(), kept
        self._cycle = replace(cycle, verifier=self._verifier)

    def __call__(self, batch: Batch, settings: GenerationSettings, ledger: Ledger | None = None) -> CycleReport:
        """One cycle."""
        report = self._cycle(batch, settings, ledger)
        logits_BNV, steps = self._verifier.last
        walks = zip(batch.requests, steps.path_BE.tolist(), steps.counts_B.tolist(), strict=True)
        for row, (request, path, count) in enumerate(walks):
            if request is not None:
                self._kept[request.index] += [logits_BNV[row, node].clone() for node in path[:count]]
        return report


class KeptWalk(LosslessVerifier):
    """The engine's own walk, which keeps what it judged last."""

    last: tuple[Tensor, Walk]

    def walk(self, reading: Reading, keys_BU: Tensor | None) -> Walk:
        """One walk."""
        steps = super().walk(reading, keys_BU)
        self.last = reading.logits_BNV, steps
        return steps


@dataclass(frozen=True)
class Kept:
    """A reply and the logits of its tokens from the second one on."""

    tokens: list[int]
    logits: list[Tensor]


@dataclass(frozen=True)
class Subject:
    """A target, its prompts, and how long the replies are."""

    name: str
    target: Target
    prompts: list[list[int]]
    num_tokens: int


@dataclass
class Compared:
    """Replies of another way of decoding against those of the plain batch; positions count up to the first different token."""

    by_token: list[float] = field(default_factory=list)
    by_sums: list[float] = field(default_factory=list)
    num_replies: int = 0
    num_changed: int = 0

    def add(self, first: Kept, second: Kept) -> None:
        """One reply in two ways."""
        self.num_replies += 1
        if first.tokens[0] != second.tokens[0]:
            self.num_changed += 1
            return
        for place in range(1, len(first.tokens)):
            pair = first.logits[place - 1], second.logits[place - 1]
            self.by_token.append(changed_by_token(*pair))
            self.by_sums.append(changed_by_sums(*pair))
            if first.tokens[place] != second.tokens[place]:
                self.num_changed += 1
                return

    def __str__(self) -> str:
        rates = (1000 * statistics.fmean(chances) for chances in (self.by_token, self.by_sums))
        return " | ".join([*(f"{rate:.4f}" for rate in rates), f"{self.num_changed} of {self.num_replies}"])


def measure(subject: Subject) -> dict[str, Compared]:
    """Trees against plain decoding, and one prompt at a time against the batch."""
    settings = GenerationSettings(subject.num_tokens, temperature=1.0, seed=1)
    plain = Recording(subject.target)
    drafting = Recording(subject.target, LMDrafter(subject.target), parse_shape(SHAPE))
    batch = plain.kept_logits(subject.prompts, settings)
    trees = drafting.kept_logits(subject.prompts, settings)
    alone = [plain.kept_logits([prompt], settings, number)[0] for number, prompt in enumerate(subject.prompts)]
    compared_by_name = {"trees against plain": Compared(), "alone against in a batch": Compared()}
    for compared, others in zip(compared_by_name.values(), (trees, alone), strict=True):
        for kept, other in zip(batch, others, strict=True):
            compared.add(kept, other)
    return compared_by_name


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
    named = {"embedded:target": [problem.question for problem in distinct_problems("test", 6, seed=0)]}
    if data is not None and (data / "models/chat-6m").is_dir():
        named[str(data / "models/chat-6m")] = list(QUESTIONS)
    for path, texts in named.items():
        target, tokenizer = Target.load(path, dtype=dtype), load_tokenizer(path)
        context = target.max_positions or 2**30
        prompts = [prompt_ids(tokenizer, text, chat=True) for text in texts]
        room = context - max(map(len, prompts))
        yield Subject(f"{Path(path).name} (V = {target.ends.vocab_size:,})", target, prompts, min(num_tokens, room))
    for vocab_size in (2**15, 2**17):
        target = random_target(vocab_size, getattr(torch, dtype))
        generator = torch.Generator().manual_seed(1)
        prompts = [torch.randint(vocab_size, (4 + number,), generator=generator).tolist() for number in range(6)]
        yield Subject(target.name, target, prompts, num_tokens)


def milliseconds(rounds: int) -> Iterator[tuple[int, int, dict[str, float]]]:
    """Vocabulary, nodes, and the fastest time of each draw, taken in turns: one node, and a tree of 32 nodes of depth 5."""
    for vocab_size, num_nodes in itertools.product((2**11, 2**15, 2**17), (1, 32)):
        places = min(num_nodes, 6)
        logits_BNV = torch.randn(1, num_nodes, vocab_size) * 3
        keys_BP, place_BN = keys_at(torch.tensor([[7]]), torch.arange(places)), torch.arange(num_nodes)[None] % places
        times: dict[str, list[float]] = {name: [] for name in DRAWS}
        for _ in range(rounds + 1):
            for name, draw in DRAWS.items():
                start = time.perf_counter()
                draw(logits_BNV, keys_BP, place_BN)
                times[name].append(1000 * (time.perf_counter() - start))
        yield vocab_size, num_nodes, {name: min(own[1:]) for name, own in times.items()}


def report(arguments: argparse.Namespace) -> Iterator[str]:
    """The page, line by line, as it is measured."""
    load = os.getloadavg()[0]
    yield f"`python -m benchmarks.decode.sampling_noise --tokens {arguments.tokens} --dtypes {','.join(arguments.dtypes)}`"
    yield ""
    yield f"{machine_line()}; load at the start {load:.1f}."
    yield ""
    yield "Tokens in 1,000 that rounding changes at T = 1, and replies that it did change (drawn with noise by token):"
    yield ""
    yield "| target | dtype | compared | noise by token | cumulative sums | changed replies | positions |"
    yield "|---|---|---|---|---|---|---|"
    for dtype in arguments.dtypes:
        for subject in subjects(arguments.data, dtype, arguments.tokens):
            for name, compared in measure(subject).items():
                yield f"| {subject.name} | {dtype} | {name} | {compared} | {len(compared.by_token)} |"
    yield ""
    yield f"Milliseconds a draw, the fastest of {arguments.rounds} rounds in turns:"
    yield ""
    yield "| V | nodes | noise by token | cumulative sums |"
    yield "|---|---|---|---|"
    for vocab_size, num_nodes, times in milliseconds(arguments.rounds):
        yield f"| {vocab_size:,} | {num_nodes} | {times['noise by token']:.2f} | {times['cumulative sums']:.2f} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--dtypes", type=lambda text: text.split(",") if text else [], default=["float32", "bfloat16"])
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
