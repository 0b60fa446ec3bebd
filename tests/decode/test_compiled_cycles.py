"""Compiled cycles: each manner of drafting, rule and adapter emits the tokens of cycles run op by op, from few graphs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from doubles import BOS, random_target
from torch import Tensor

from draftsmith.decode import Engine, GenerationSettings
from draftsmith.decode.runners import CompiledRunner
from draftsmith.decode.verify.lossy_rule import LossyRule
from draftsmith.decode.verify.lossy_rules import Divergence, Typical
from draftsmith.models import Drafter, Eagle, LMDrafter, ReDrafter, Target
from draftsmith.models.drafters.lora import LoraSettings, add_adapter
from draftsmith.models.tree.shapes import parse_shape

PROMPTS = [[BOS, 5, 9, 11, 4], [BOS, 7], [BOS, 8, 8, 8, 30, 31, 32], [BOS, 3, 4]]
GREEDY = GenerationSettings(max_new_tokens=50)
DRAWN = GenerationSettings(max_new_tokens=50, temperature=1.0, top_p=0.9, seed=3)
PENALISED = replace(DRAWN, repetition_penalty=1.2, min_p=0.01)


@dataclass(frozen=True)
class Case:
    """A cycle to compile. The cases pair families and manners of drafting with temperatures, penalties, rules and adapters."""

    drafter: str
    shape: str
    request: GenerationSettings
    rule: LossyRule | None = None


CASES = [
    Case("redrafter", "1x3", GREEDY, Divergence(0.5)),
    Case("eagle", "3x3n5", PENALISED, Typical(0.3)),
    Case("eagle", "s2.1", PENALISED),
    Case("draft LM", "k2.1", DRAWN),
    Case("adapted", "2x3n4e0.5", PENALISED),
]


@pytest.fixture(scope="module")
def target() -> Target:
    return random_target()


def adapted(target: Target) -> Drafter:
    """A drafter with an adapter of random weights."""
    drafter = ReDrafter.for_target(target.ends, head_init="random").eval()
    add_adapter(drafter, LoraSettings(rank=2), "a")
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for name, parameter in drafter.named_parameters():
            if ".lora_" in name:
                parameter.copy_(0.25 * torch.randn(parameter.shape, generator=generator))
    return drafter.eval()


@pytest.fixture(scope="module")
def drafters(target: Target) -> dict[str, Drafter]:
    torch.manual_seed(5)
    return {
        "redrafter": ReDrafter.for_target(target.ends).eval(),
        "eagle": Eagle.for_target(target.ends).eval(),
        "draft LM": LMDrafter(random_target(seed=3)).eval(),
        "adapted": adapted(target),
    }


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.drafter} {case.shape}")
def test_all_cycles_of_a_call_are_one_or_two_graphs_that_emit_the_same_tokens(
    target: Target, drafters: dict[str, Drafter], case: Case, recwarn: pytest.WarningsRecorder
) -> None:
    graphs = 0

    def counting(graph: torch.fx.GraphModule, _: list[Tensor]) -> Callable[..., Any]:
        nonlocal graphs
        graphs += 1
        return graph.forward

    torch._dynamo.reset()
    limits, drafter = parse_shape(case.shape), drafters[case.drafter]
    engine = Engine(target, drafter, limits, rule=case.rule, runner=lambda cycle: CompiledRunner(cycle, counting))
    replies = engine.generate(PROMPTS, case.request, num_rows=2)
    op_by_op = Engine(target, drafter, limits, rule=case.rule).generate(PROMPTS, case.request)
    assert [reply.token_ids for reply in replies] == [reply.token_ids for reply in op_by_op]
    assert max(reply.cycles_before + len(reply.accepted) for reply in replies) > 40
    assert 1 <= graphs <= 2
    assert not [warning for warning in recwarn if "op by op" in str(warning.message)]
