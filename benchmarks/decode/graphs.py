"""What a compiler makes of a cycle: one graph for every family, manner and temperature, its attention shapes, its kernels a layer.

    python -m benchmarks.decode.graphs [--cycles 100] [--shaped_cycles 500] [--sections graphs shapes kernels]

Three checks of the decoder for a GPU that need no GPU. *graphs*: every family with random weights, in every manner of drafting, at T = 0
and 1, traced whole; the tokens must be those of cycles run op by op. *shapes*: distinct shapes of attention over many cycles. *kernels*:
what inductor makes of one layer of a Llama model in a plain step and in a verification. Targets are tiny, with random weights.
"""

from __future__ import annotations

import argparse
import re
import shlex
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.machine import machine_line
from draftsmith.decode import Engine, GenerationSettings
from draftsmith.decode.cycle import DecodeCycle
from draftsmith.decode.runners import CompiledRunner
from draftsmith.models import Drafter, LMDrafter, Target, all_families
from draftsmith.models.tree.shapes import parse_shape

SECTIONS = ("graphs", "shapes", "kernels")
SHAPES = ("1x3", "4x3", "4x3n6", "t2.1", "4x3n6e0.5", "s1.1.1", "s2.1", "k2.1", "b1.1.1")
PROMPTS = [[1, 5, 9, 11, 4], [1, 7]]
VOCABULARY = 64
_KERNEL = re.compile(
    r"^ *(?:cpp_fused_\w+\(|triton_\w+\.run\(|extern_kernels\.\w+\(|\w+ = torch\.ops\.aten\.\w+)", re.MULTILINE
)


@dataclass(frozen=True)
class Trace:
    """What one way of drafting became.

    Attributes:
        graphs: made for all cycles.
        cycles: decoded by the row with most of them.
        same: whether the tokens were those of cycles run op by op.
    """

    graphs: int
    cycles: int
    same: bool


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.decode.graphs", description=__doc__)
    parser.add_argument("--cycles", type=int, default=100, help="at least so many cycles for a graph")
    parser.add_argument("--shaped_cycles", type=int, default=500, help="cycles whose attention is watched")
    parser.add_argument("--sections", nargs="+", choices=SECTIONS, default=SECTIONS)
    parser.add_argument("--drafters", nargs="+", help="families by name, plain, or 'draft LM'; default: all")
    parser.add_argument("--shapes", nargs="+", default=SHAPES, help="manners of drafting")
    options = parser.parse_args(arguments)
    options.words = list(sys.argv[1:] if arguments is None else arguments)
    return options


def tiny_target(layers: int = 3, hidden: int = 32, seed: int = 0) -> Target:
    """A Llama model with random weights."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=hidden,
        intermediate_size=2 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=4096,
    )
    target = Target.from_model(LlamaForCausalLM(config).eval(), name="tiny")
    target.merge()
    return target


def drafters_for(target: Target) -> dict[str, Drafter | None]:
    """Every family with its usual settings and random weights, a draft LM, and None for plain decoding."""
    families = {family.name: family.settings().build(target.ends, None, 3, "").eval() for family in all_families()}
    return {"plain": None, **families, "draft LM": LMDrafter(tiny_target(seed=3)).eval()}


def chosen(target: Target, names: Sequence[str] | None) -> dict[str, Drafter | None]:
    """Some of these by name, or all."""
    return {name: drafter for name, drafter in drafters_for(target).items() if names is None or name in names}


def trace(target: Target, drafter: Drafter | None, shape: str, temperature: float, cycles: int) -> Trace:
    """Decode until every row has had so many cycles, traced whole and op by op.

    Args:
        target: decodes.
        drafter: attached to it, or None.
        shape: what it drafts.
        temperature: of the request.
        cycles: how many at least; random drafts are hardly ever accepted, unless they are drawn.
    """
    graphs = 0

    def counted(graph: torch.fx.GraphModule, _: list[Tensor]) -> Callable[..., Any]:
        nonlocal graphs
        graphs += 1
        return graph.forward

    torch._dynamo.reset()
    limits = parse_shape(shape)
    longest = cycles * (1 + limits.draft_length) if limits.sampled is not None else cycles + cycles // 5
    request = GenerationSettings(max_new_tokens=longest, temperature=temperature, eos_token_ids=())
    traced = Engine(target, drafter, limits, runner=lambda cycle: CompiledRunner(cycle, counted))
    replies = traced.generate(PROMPTS, request)
    expected = Engine(target, drafter, limits).generate(PROMPTS, request)
    same = [reply.token_ids for reply in replies] == [reply.token_ids for reply in expected]
    return Trace(graphs, max(len(reply.accepted) for reply in replies), same)


def graph_rows(options: argparse.Namespace) -> Iterator[str]:
    """The product of families, manners and temperatures."""
    yield "| drafter | shape | T | cycles | graphs | tokens of cycles run op by op |"
    yield "|---|---|---|---|---|---|"
    target = tiny_target()
    for name, drafter in chosen(target, options.drafters).items():
        for shape in options.shapes if drafter is not None else options.shapes[:1]:
            for temperature in (1.0,) if parse_shape(shape).sampled is not None else (0.0, 1.0):
                made = trace(target, drafter, shape, temperature, options.cycles)
                shown = "the same" if made.same else "**others**"
                yield f"| {name} | {shape} | {temperature:g} | {made.cycles} | {made.graphs} | {shown} |"


@contextmanager
def watched_attention(seen: set[tuple[torch.Size, torch.Size]], cycles: list[int]) -> Iterator[None]:
    """Note the shapes of queries and keys inside of cycles, and count these."""
    attention, call = torch.nn.functional.scaled_dot_product_attention, DecodeCycle.__call__
    inside = False

    def noted(query: Tensor, key: Tensor, *rest: Any, **named: Any) -> Tensor:
        if inside:
            seen.add((query.shape, key.shape))
        return attention(query, key, *rest, **named)

    def counted(self: DecodeCycle, *arguments: Any) -> Any:
        nonlocal inside
        cycles[0] += 1
        inside = True
        try:
            return call(self, *arguments)
        finally:
            inside = False

    with (
        patch.object(torch.nn.functional, "scaled_dot_product_attention", noted),
        patch.object(DecodeCycle, "__call__", counted),
    ):
        yield


def shape_rows(options: argparse.Namespace) -> Iterator[str]:
    """How many shapes of attention a captured cycle would plan for."""
    yield "| drafter | shape | cycles | shapes of attention, target and drafter together |"
    yield "|---|---|---|---|"
    target = tiny_target()
    for name, drafter in chosen(target, options.drafters).items():
        shape = "1x3" if drafter is None else "4x3n6"
        seen: set[tuple[torch.Size, torch.Size]] = set()
        cycles = [0]
        request = GenerationSettings(max_new_tokens=options.shaped_cycles, eos_token_ids=())
        engine = Engine(target, drafter, parse_shape(shape), runner=lambda cycle: cycle)
        with watched_attention(seen, cycles):
            while cycles[0] < options.shaped_cycles:
                engine.generate(PROMPTS, request)
        yield f"| {name} | {shape} | {cycles[0]} | {len(seen)} |"


def kernels_of(layers: int, shape: str | None) -> int:
    """Kernels that inductor makes of a cycle's whole graph, those of its libraries counted too.

    Args:
        layers: of the target, which has the widths that make inductor split products as in large models.
        shape: drafted by a draft LM of one layer; None for a plain step.
    """
    from torch._inductor.graph import GraphLowering

    codes: list[str] = []
    target = tiny_target(layers, hidden=256)
    drafter = None if shape is None else LMDrafter(tiny_target(1, seed=3)).eval()
    torch._dynamo.reset()
    engine = Engine(target, drafter, None if shape is None else parse_shape(shape), runner=CompiledRunner)
    with (
        patch.object(GraphLowering, "save_output_code", staticmethod(codes.append)),
        torch._inductor.utils.fresh_cache(),
    ):
        engine.generate(PROMPTS[:1], GenerationSettings(max_new_tokens=8, eos_token_ids=()))
    bodies = [code.split("def call(")[1] for code in codes]
    return max(len(_KERNEL.findall(body)) for body in bodies)


def kernel_rows(_: argparse.Namespace) -> Iterator[str]:
    """What one more layer of the target adds."""
    yield "| cycle | kernels with 2 layers | with 4 layers | a layer |"
    yield "|---|---|---|---|"
    for name, shape in (("plain step", None), ("verification of a chain of 3", "1x3")):
        few, many = kernels_of(2, shape), kernels_of(4, shape)
        yield f"| {name} | {few} | {many} | {(many - few) / 2:g} |"


def report(options: argparse.Namespace) -> Iterator[str]:
    """The page, line by line."""
    yield f"`{shlex.join(['python', '-m', 'benchmarks.decode.graphs', *options.words])}`"
    yield ""
    yield f"{machine_line()}, float32, two rows; random weights."
    rows = {"graphs": graph_rows, "shapes": shape_rows, "kernels": kernel_rows}
    for section in SECTIONS:
        if section in options.sections:
            yield ""
            yield from rows[section](options)


if __name__ == "__main__":
    for line in report(parse()):
        print(line, flush=True)
