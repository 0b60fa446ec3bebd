"""A cycle as one function: fixed shapes, fixed addresses, one graph, and the tokens of plain decoding all the same."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from doubles import BOS, random_target, tensors_of
from every_family import EVERY_FAMILY, fresh, name_of
from functorch.compile import make_boxed_func
from torch import Tensor
from torch._functorch.aot_autograd import aot_module_simplified
from torch.nn import functional as F

from draftsmith.decode import Engine, GenerationSettings
from draftsmith.decode.adapter_engine import AdapterSwitch
from draftsmith.decode.batch import Batch
from draftsmith.decode.constraints import Constraints
from draftsmith.decode.cycle import CycleReport, DecodeCycle
from draftsmith.decode.runners import CompiledRunner, Runner
from draftsmith.models import Drafter, DraftLimits, LMDrafter, Target
from draftsmith.models.tree.shapes import parse_shape

PROMPTS = [[BOS, 5, 9, 11, 4], [BOS, 7], [BOS, 8, 8, 8, 30, 31, 32], [BOS, 3, 4]]
GREEDY = GenerationSettings(max_new_tokens=9, repetition_penalty=1.2)
DRAWN = GenerationSettings(max_new_tokens=9, temperature=1.0, top_p=0.9, seed=3)


@pytest.fixture(scope="module")
def target() -> Target:
    return random_target()


@pytest.fixture(scope="module")
def drafters(target: Target) -> dict[str, Drafter | None]:
    families = {name_of(family): fresh(family, target.ends) for family in EVERY_FAMILY}
    return {"plain": None, **families, "draft LM": LMDrafter(random_target(seed=3)).eval()}


def eager(cycle: DecodeCycle) -> Runner:
    return cycle


def tokens(engine: Engine, request: GenerationSettings, num_rows: int | None = None) -> list[list[int]]:
    return [generation.token_ids for generation in engine.generate(PROMPTS, request, num_rows=num_rows)]


SHAPES = {
    "plain": ["1x3"],
    "draft LM": ["1x3", "2x3n4"],
    **{name_of(family): ["1x3", "3x3", "3x3n5", "s2.1", "k2.1"] for family in EVERY_FAMILY},
}


@pytest.mark.parametrize(("name", "shape"), [(name, shape) for name, shapes in SHAPES.items() for shape in shapes])
def test_fixed_shapes_emit_the_same_tokens(
    target: Target, drafters: dict[str, Drafter | None], name: str, shape: str
) -> None:
    limits = parse_shape(shape)
    for request in (DRAWN,) if limits.sampled is not None else (GREEDY, DRAWN):
        expected = tokens(Engine(target), request)
        if limits.sampled is not None:  # exact in law, not token by token
            expected = tokens(Engine(target, drafters[name], limits), request)
        fixed = Engine(target, drafters[name], limits, runner=eager)
        assert tokens(fixed, request) == expected
        assert tokens(fixed, request, num_rows=2) == expected


ONE_GRAPH = {
    "plain": ("plain", "1x3", DRAWN),
    "recurrent beams": ("redrafter", "3x3", GREEDY),
    "dynamic tree": ("eagle", "3x3n5", DRAWN),
    "sampled tree": ("redrafter", "k2.1", DRAWN),
    "static tree": ("redrafter", "t2.1", DRAWN),
    "early stop": ("eagle", "2x3e0.5", GREEDY),
    "draft LM": ("draft LM", "1x2", GREEDY),
    **{f"dynamic tree of {name}": (name, "2x2n3", DRAWN) for name in map(name_of, EVERY_FAMILY) if name != "eagle"},
}


@pytest.mark.parametrize(("name", "shape", "request_settings"), ONE_GRAPH.values(), ids=ONE_GRAPH)
def test_a_whole_cycle_is_one_graph_for_all_lengths_and_rows(
    target: Target, drafters: dict[str, Drafter | None], name: str, shape: str, request_settings: GenerationSettings
) -> None:
    graphs = 0

    def counting(graph: torch.fx.GraphModule, _: list[Tensor]) -> Callable[..., Any]:
        nonlocal graphs
        graphs += 1
        return graph.forward

    torch._dynamo.reset()
    limits, drafter = parse_shape(shape), drafters[name]
    engine = Engine(target, drafter, limits, runner=lambda cycle: CompiledRunner(cycle, counting))
    expected = tokens(Engine(target, drafter, limits), request_settings)
    assert tokens(engine, request_settings, num_rows=2) == expected
    assert tokens(engine, request_settings, num_rows=2) == expected
    # The state of an early stop is made anew for rows that enter, which the compiler follows once.
    assert graphs <= (2 if limits.early_stop is not None else 1)


def test_writing_keys_copies_no_other_layer_in_a_compiled_cycle(target: Target) -> None:
    written: list[str] = []

    def without_views(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Callable[..., Any]:
        written.extend(node.target.__name__ for node in graph.graph.nodes if node.op == "call_function")
        return graph.forward

    def functional(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Callable[..., Any]:
        return aot_module_simplified(graph, inputs, fw_compiler=lambda *own: make_boxed_func(without_views(*own)))

    torch._dynamo.reset()
    engine = Engine(target, runner=lambda cycle: CompiledRunner(cycle, functional))
    assert tokens(engine, GREEDY) == tokens(Engine(target), GREEDY)
    assert sum(name.startswith("index_put") for name in written) >= 2 * target.config.num_hidden_layers
    assert not [name for name in written if name.startswith("select_scatter")]


def test_attention_has_one_shape_for_the_target_and_two_for_a_drafter(
    target: Target, drafters: dict[str, Drafter | None], monkeypatch: pytest.MonkeyPatch
) -> None:
    shapes: list[set[tuple[torch.Size, torch.Size]]] = []
    attention, call = F.scaled_dot_product_attention, DecodeCycle.__call__

    def watched(query: Tensor, key: Tensor, *rest: Any, **named: Any) -> Tensor:
        if shapes:
            shapes[-1].add((query.shape, key.shape))
        return attention(query, key, *rest, **named)

    def apart(self: DecodeCycle, *arguments: Any) -> CycleReport:
        shapes.append(set())
        return call(self, *arguments)

    monkeypatch.setattr(F, "scaled_dot_product_attention", watched)
    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", watched)
    monkeypatch.setattr(DecodeCycle, "__call__", apart)
    engine = Engine(target, drafters["eagle"], DraftLimits(3, 4), runner=eager)
    engine.generate(PROMPTS[:2], GenerationSettings(max_new_tokens=40))
    assert len(shapes) > 10
    assert {len(cycle) for cycle in shapes} == {3}
    assert len(set().union(*shapes)) == 3


@pytest.mark.parametrize("name", ["plain", *map(name_of, EVERY_FAMILY), "draft LM"])
def test_state_keeps_its_addresses_from_cycle_to_cycle(
    target: Target, drafters: dict[str, Drafter | None], name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: set[tuple[int, ...]] = set()
    call = DecodeCycle.__call__

    def watched(self: DecodeCycle, batch: Batch, *rest: Any) -> CycleReport:
        report = call(self, batch, *rest)
        seen.add(tuple(tensor.data_ptr() for tensor in tensors_of(batch)))
        return report

    monkeypatch.setattr(DecodeCycle, "__call__", watched)
    tokens(Engine(target, drafters[name], DraftLimits(1, 3), runner=eager), DRAWN, num_rows=2)
    assert len(seen) == 1
    assert len(next(iter(seen))) > 6


def test_a_cycle_that_needs_the_host_runs_op_by_op_and_the_reason_is_given_once(target: Target) -> None:
    request = GenerationSettings(max_new_tokens=5, constraints=Constraints(no_repeat_ngram_size=2))
    engine = Engine(target, runner=eager)
    with pytest.warns(UserWarning, match="op by op, not compiled: .*generation config"):
        first = tokens(engine, request)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("warnings.warn", lambda *_, **__: pytest.fail("said twice"))
        assert tokens(engine, request) == first == tokens(Engine(target), request)


def test_a_drafter_that_switches_modules_is_not_compiled(target: Target) -> None:
    switch = AdapterSwitch(fresh(EVERY_FAMILY[0], target.ends), {})
    switch.assign([None] * len(PROMPTS))
    engine = Engine(target, switch, DraftLimits(1, 2), runner=eager)
    with pytest.warns(UserWarning, match="adapters switch"):
        replies = tokens(engine, GREEDY)
    assert replies == tokens(Engine(target), GREEDY)


def test_an_unknown_way_of_compiling_is_refused(target: Target) -> None:
    with pytest.raises(ValueError, match="compile is 'yes'; give one of auto, on, off"):
        Engine(target, compile="yes")  # type: ignore[arg-type]


def test_the_host_waits_for_the_stream_of_the_device_that_the_report_lies_on(monkeypatch: pytest.MonkeyPatch) -> None:
    """The current device may be another one; its streams say nothing of this report."""
    recorded: list[Any] = []

    class Event:
        def record(self, stream: Any = None) -> None:
            recorded.append(stream)

        def synchronize(self) -> None:
            recorded.append("waited")

    class OnSecondDevice(torch.Tensor):
        device = torch.device("cuda", 1)

    columns_BC = torch.tensor([[1, 5]])
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device=None: f"stream of {device}")
    monkeypatch.setattr(torch, "empty_like", lambda *_, **__: torch.zeros(1, 2, dtype=torch.int64))
    report = CycleReport(columns_BC.as_subclass(OnSecondDevice), 1, 0, 1).to_host()
    assert recorded == ["stream of cuda:1"]
    assert report.read() == [[1, 5]]
    assert recorded == ["stream of cuda:1", "waited"]
