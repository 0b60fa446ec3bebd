"""The shape of the draft may change from cycle to cycle, down to none: replies stay the target's own, and the drafter keeps up."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from doubles import BOS, PlannedDrafter, random_target, tensors_of
from every_family import EVERY_FAMILY, OUR_FAMILIES, fresh, name_of
from torch import Tensor

from draftsmith.decode import Engine, GenerationSettings
from draftsmith.decode.adapter_engine import AdapterSwitch
from draftsmith.decode.batch import Batch
from draftsmith.decode.cycle import CycleReport, DecodeCycle
from draftsmith.decode.runners import CompiledRunner, Runner
from draftsmith.decode.verify.rule_text import parse_rule
from draftsmith.models import Cycle, Drafter, DraftLimits, DraftTree, LMDrafter, ShapesByRows, Target
from draftsmith.models.tree.kept_shapes import KeptShapes
from draftsmith.models.tree.shapes import parse_shape

PROMPTS = [[BOS, 5, 9, 11, 4], [BOS, 7], [BOS, 8, 8, 8, 30, 31, 32], [BOS, 3, 4], [BOS, 40], [BOS, 41, 42, 43]]
ENDS = tuple(range(3, 9))
GREEDY = GenerationSettings(max_new_tokens=12, eos_token_ids=ENDS)
DRAWN = GenerationSettings(max_new_tokens=12, eos_token_ids=ENDS, temperature=1.0, min_p=0.02, seed=5)
TEXTS = ("3x3n7", "1x2", "2x3", "t3.1")
ALL = ShapesByRows(
    ((1, parse_shape(TEXTS[0])), (2, None), *((3 + n, parse_shape(text)) for n, text in enumerate(TEXTS[1:])))
)
BY_LOAD = ShapesByRows(((1, parse_shape("3x3n7")), (3, parse_shape("1x2")), (4, None)))
Plain = list[tuple[GenerationSettings, list[list[int]]]]
NAMES = [*map(name_of, EVERY_FAMILY), "draft LM"]


@dataclass(frozen=True)
class AtRandom(ShapesByRows):
    """Any of the shapes, whatever the number of rows, in an order that a seed gives."""

    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "draws", random.Random(self.seed))

    def at(self, num_rows: int) -> DraftLimits | None:
        return self.draws.choice(self.shapes)


@pytest.fixture(scope="module")
def target() -> Target:
    return random_target()


@pytest.fixture(scope="module")
def drafters(target: Target) -> dict[str, Drafter]:
    families: dict[str, Drafter] = {name_of(family): fresh(family, target.ends) for family in EVERY_FAMILY}
    return {**families, "draft LM": LMDrafter(random_target(seed=3)).eval()}


def eager(cycle: DecodeCycle) -> Runner:
    return cycle


def tokens(engine: Engine, request: GenerationSettings, num_rows: int | None = None) -> list[list[int]]:
    return [generation.token_ids for generation in engine.generate(PROMPTS, request, num_rows=num_rows)]


@pytest.fixture(scope="module")
def plain(target: Target) -> Plain:
    """Settings with the replies of plain decoding."""
    return [(request, tokens(Engine(target), request)) for request in (GREEDY, DRAWN)]


@pytest.mark.parametrize("fixed", [False, True])
@pytest.mark.parametrize("name", NAMES)
def test_replies_are_those_of_plain_decoding_wherever_shapes_change(
    target: Target, drafters: dict[str, Drafter], plain: Plain, name: str, fixed: bool
) -> None:
    engine = Engine(target, drafters[name], AtRandom(ALL.steps, 1), runner=eager if fixed else None)
    for request, expected in plain:
        for num_rows in (None, 2):
            assert tokens(engine, request, num_rows) == expected


def first_draft(
    target: Target, drafter: Drafter, shape: DraftLimits, text: list[int], drafts: list[DraftTree]
) -> DraftTree:
    """What is drafted behind a prompt and the token that the target adds."""
    drafts.clear()
    Engine(target, drafter, shape).generate([text], GenerationSettings(max_new_tokens=2))
    return drafts[0]


@pytest.mark.parametrize("fixed", [False, True])
@pytest.mark.parametrize("name", NAMES)
def test_a_draft_is_the_same_whatever_was_drafted_before_it(
    target: Target, drafters: dict[str, Drafter], name: str, fixed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a drafter that lost a token in a cycle without a draft, replies would be the same and drafts worse."""
    drafts: list[DraftTree] = []
    propose = Drafter.propose

    def recorded(self: Drafter, state: Any, cycle: Cycle, limits: DraftLimits) -> DraftTree:
        drafts.append(propose(self, state, cycle, limits))
        return drafts[-1]

    monkeypatch.setattr(Drafter, "propose", recorded)
    shapes, prompt = AtRandom(ALL.steps, 3), PROMPTS[0]
    engine = Engine(target, drafters[name], shapes, runner=eager if fixed else None)
    [reply] = engine.generate([prompt], GenerationSettings(max_new_tokens=18))
    seen, place = list(drafts), 0
    assert 0 in reply.depths
    for accepted, depth in zip(reply.accepted, reply.depths, strict=True):
        if depth > 0:
            drafted = seen.pop(0)
            assert drafted.tokens_BN[0, 0] == reply.token_ids[place]
            fitting = [shape for shape in shapes.drafted if shape.draft_length == depth]
            expected = [
                first_draft(target, drafters[name], shape, prompt + reply.token_ids[:place], drafts)
                for shape in fitting
            ]
            assert nodes(drafted) in list(map(nodes, expected))
        place += accepted + 1
    assert not seen


def nodes(tree: DraftTree) -> list[list[int]]:
    """Token, parent and depth of the real nodes of the first row."""
    return torch.stack([tree.tokens_BN, tree.parents_BN, tree.depths_BN], -1)[0][tree.valid_BN[0]].tolist()


@pytest.mark.parametrize("fixed", [False, True])
def test_each_cycle_drafts_for_the_rows_that_still_decode(
    target: Target, drafters: dict[str, Drafter], fixed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    drafted: list[tuple[int, DraftLimits | None]] = []
    call = DecodeCycle.__call__

    def watched(self: DecodeCycle, batch: Batch, *rest: Any) -> CycleReport:
        drafted.append((sum(request is not None for request in batch.requests), self.shape))
        return call(self, batch, *rest)

    monkeypatch.setattr(DecodeCycle, "__call__", watched)
    engine = Engine(target, drafters["redrafter"], BY_LOAD, runner=eager if fixed else None)
    request, expected = (
        GenerationSettings(max_new_tokens=20),
        tokens(Engine(target), GenerationSettings(max_new_tokens=20)),
    )
    drafted.clear()
    replies = engine.generate(PROMPTS, request, num_rows=4, until=lambda index, reply: len(reply) == 3 * index + 2)
    assert all(shape == BY_LOAD.at(alive) for alive, shape in drafted)
    assert {shape for _, shape in drafted} == set(BY_LOAD.shapes)
    assert [reply.token_ids for reply in replies] == [own[: 3 * index + 2] for index, own in enumerate(expected)]


def test_state_keeps_its_addresses_while_shapes_change(
    target: Target, drafters: dict[str, Drafter], monkeypatch: pytest.MonkeyPatch
) -> None:
    call = DecodeCycle.__call__
    for name in NAMES:
        seen: set[tuple[int, ...]] = set()

        def watched(self: DecodeCycle, batch: Batch, *rest: Any, seen: set[tuple[int, ...]] = seen) -> CycleReport:
            report = call(self, batch, *rest)
            seen.add(tuple(tensor.data_ptr() for tensor in tensors_of(batch)))
            return report

        monkeypatch.setattr(DecodeCycle, "__call__", watched)
        tokens(Engine(target, drafters[name], AtRandom(ALL.steps, 4), runner=eager), DRAWN, num_rows=2)
        assert len(seen) == 1


def test_there_is_one_graph_a_shape_and_none_comes_later(target: Target, drafters: dict[str, Drafter]) -> None:
    graphs = 0

    def counting(graph: torch.fx.GraphModule, _: list[Tensor]) -> Callable[..., Any]:
        nonlocal graphs
        graphs += 1
        return graph.forward

    torch._dynamo.reset()
    shapes = ShapesByRows(((1, DraftLimits(draft_length=2)), (2, None)))
    engine = Engine(target, drafters["redrafter"], shapes, runner=lambda cycle: CompiledRunner(cycle, counting))
    expected = tokens(Engine(target), GREEDY)
    assert tokens(engine, GREEDY, num_rows=2) == expected
    assert tokens(engine, GREEDY, num_rows=2) == expected
    assert graphs == 2


def test_adapters_follow_group_by_group(target: Target) -> None:
    for family in OUR_FAMILIES:
        switch = AdapterSwitch(fresh(family, target.ends), {})
        switch.assign([None] * len(PROMPTS))
        assert tokens(Engine(target, switch, AtRandom(ALL.steps, 6)), GREEDY) == tokens(Engine(target), GREEDY)


def test_a_lossy_rule_goes_with_every_shape(target: Target, drafters: dict[str, Drafter]) -> None:
    engine = Engine(target, drafters["redrafter"], AtRandom(ALL.steps, 7), rule=parse_rule("everything")[1])
    replies = engine.generate(PROMPTS, GenerationSettings(max_new_tokens=12))
    for reply in replies:
        assert 0 in reply.depths
        assert reply.by_rule
        assert all(accepted == 0 for accepted, depth in zip(reply.accepted, reply.depths, strict=True) if depth == 0)


def test_where_no_shape_drafts_the_drafter_does_nothing(target: Target, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(PlannedDrafter, "start", lambda *_: pytest.fail("the drafter was started"))
    engine = Engine(target, PlannedDrafter(target, "oracle"), ShapesByRows(((4, None),)))
    assert tokens(engine, GREEDY) == tokens(Engine(target), GREEDY)


def kept(folder: Path, target: Target, shapes: ShapesByRows = BY_LOAD) -> Path:
    KeptShapes(shapes, (1, 2), target.name, target.fingerprint, "cpu", "a processor", "float32").write(folder)
    return folder


def test_kept_shapes_are_drafted_where_nothing_else_is_asked_for(target: Target, tmp_path: Path) -> None:
    family = next(family for family in OUR_FAMILIES if family.name == "redrafter")
    fresh(family, target.ends).save_pretrained(tmp_path)
    drafter = family.drafter.from_pretrained(tmp_path)
    assert Engine(target, drafter).limits == DraftLimits()
    kept(tmp_path, target)
    assert Engine(target, drafter).shapes == BY_LOAD
    assert Engine(target, drafter, DraftLimits(2, 2)).shapes == ShapesByRows.always(DraftLimits(2, 2))
    assert Engine(target, drafter, rule=parse_rule("everything")[1]).limits == DraftLimits()  # measured without a rule
    assert Engine(target, fresh(family, target.ends)).limits == DraftLimits()
    assert Engine(target, drafter).drafter is not None
    other = random_target(seed=9)
    with pytest.warns(UserWarning, match="is not used: it was measured with another target"):
        assert Engine(other, drafter.for_any_target()).limits == DraftLimits()
