"""Ways of running a cycle: one cycle ahead of the host, again in later calls, and op by op where compiling or capturing fails."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from doubles import BOS, family_configs, random_model, random_target, tensors_of
from every_family import EVERY_FAMILY, fresh, name_of

from draftsmith.decode import Engine, GenerationSettings, Ledger
from draftsmith.decode.batch import Batch
from draftsmith.decode.cycle import CycleReport, DecodeCycle
from draftsmith.decode.runners import CapturedRunner, CompiledRunner, Runner, needs_host
from draftsmith.decode.verify.lossy_rule import LossyRule
from draftsmith.decode.verify.lossy_rules import Divergence, Typical
from draftsmith.decode.verify.thoughts import ThoughtMarks
from draftsmith.decode.verify.uncertain_rules import Relaxed
from draftsmith.models import Drafter, DraftLimits, Family, LMDrafter, ReDrafter, Target
from draftsmith.models.lora.lora_adapter import LoraSettings, add_adapter
from draftsmith.models.tree.shapes import parse_shape

PROMPTS = [[BOS, 5, 9, 11, 4], [BOS, 7], [BOS, 8, 8, 8, 30, 31, 32], [BOS, 3, 4]]
GREEDY = GenerationSettings(max_new_tokens=9, repetition_penalty=1.2)
DRAWN = GenerationSettings(max_new_tokens=9, temperature=1.0, top_p=0.9, seed=3)


class Ahead:
    """As a captured graph does it: a cycle has begun before the host reads the one before."""

    runs_ahead = True

    def __init__(self, cycle: DecodeCycle) -> None:
        self._cycle = cycle

    def __call__(self, batch: Batch, settings: GenerationSettings, ledger: Ledger | None = None) -> CycleReport:
        return self._cycle(batch, settings, ledger)


def eager(cycle: DecodeCycle) -> Runner:
    return cycle


@pytest.fixture(scope="module")
def target() -> Target:
    return random_target()


@pytest.fixture(scope="module")
def drafters(target: Target) -> dict[str, Drafter | None]:
    families = {name_of(family): fresh(family, target.ends) for family in EVERY_FAMILY}
    return {"plain": None, **families, "draft LM": LMDrafter(random_target(seed=3)).eval()}


def tokens(engine: Engine, request: GenerationSettings, num_rows: int | None = None) -> list[list[int]]:
    return [generation.token_ids for generation in engine.generate(PROMPTS, request, num_rows=num_rows)]


@pytest.mark.parametrize("request_settings", [GREEDY, DRAWN], ids=["greedy", "drawn"])
@pytest.mark.parametrize("name", ["plain", *map(name_of, EVERY_FAMILY), "draft LM"])
def test_a_host_that_is_one_cycle_behind_reads_the_same_tokens(
    target: Target, drafters: dict[str, Drafter | None], name: str, request_settings: GenerationSettings
) -> None:
    expected = tokens(Engine(target), request_settings)
    engine = Engine(target, drafters[name], DraftLimits(3, 3), runner=Ahead)
    assert tokens(engine, request_settings) == expected
    assert tokens(engine, request_settings, num_rows=2) == expected
    assert tokens(engine, request_settings, num_rows=1) == expected


@pytest.fixture(scope="module")
def in_bfloat16() -> Target:
    return Target.from_model(random_model(family_configs()["llama"]).to(torch.bfloat16))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("family", EVERY_FAMILY, ids=name_of)
def test_drafters_of_either_dtype_draft_for_a_target_in_bfloat16(
    in_bfloat16: Target, family: Family, dtype: torch.dtype
) -> None:
    drafter = torch.nn.Module.to(fresh(family, in_bfloat16.ends), dtype)
    engine = Engine(in_bfloat16, drafter, DraftLimits(3, 3), runner=eager)
    assert [len(reply) for reply in tokens(engine, DRAWN, num_rows=2)] == [DRAWN.max_new_tokens] * len(PROMPTS)


def test_what_a_cycle_does_for_a_request_that_has_ended_is_dropped(target: Target) -> None:
    seen: list[tuple[int, list[int]]] = []
    engine = Engine(target, runner=Ahead)
    replies = engine.generate(PROMPTS, GREEDY, on_tokens=lambda *each: seen.append(each), num_rows=2)
    for index, reply in enumerate(replies):
        assert [token for number, tokens in seen for token in tokens if number == index] == reply.token_ids
        assert len(reply.token_ids) == len(reply.accepted) + 1


def test_a_later_call_of_other_lengths_uses_the_same_state(
    target: Target, drafters: dict[str, Drafter | None], monkeypatch: pytest.MonkeyPatch
) -> None:
    addresses: set[tuple[int, ...]] = set()
    call = DecodeCycle.__call__

    def watched(self: DecodeCycle, batch: Batch, *rest: Any) -> CycleReport:
        report = call(self, batch, *rest)
        addresses.add(tuple(tensor.data_ptr() for tensor in tensors_of(batch)))
        return report

    monkeypatch.setattr(DecodeCycle, "__call__", watched)
    engine = Engine(target, drafters["eagle"], DraftLimits(2, 3), runner=eager)
    plain = Engine(target)
    for prompts in ([[BOS, 5, 9, 11, 4], [BOS, 7]], [[BOS, 4], [BOS, 6, 6, 6]], [[BOS, 8], [BOS, 9]]):
        replies = engine.generate(prompts, DRAWN)
        assert [reply.token_ids for reply in replies] == [reply.token_ids for reply in plain.generate(prompts, DRAWN)]
    with_drafts = {each for each in addresses if len(each) == max(map(len, addresses))}
    assert len(with_drafts) == 1


def test_a_call_that_was_left_in_the_middle_does_not_enter_the_next(target: Target) -> None:
    engine = Engine(target, runner=eager)
    stream = engine.stream(iter(enumerate(PROMPTS)), GREEDY, num_rows=2, room=20)
    next(stream)
    stream.close()
    assert tokens(engine, GREEDY, num_rows=2) == tokens(Engine(target), GREEDY)


def test_a_call_with_other_settings_starts_anew(target: Target) -> None:
    engine = Engine(target, runner=eager)
    for request in (GREEDY, DRAWN, GREEDY):
        assert tokens(engine, request, num_rows=2) == tokens(Engine(target), request)


def test_a_cycle_that_cannot_be_compiled_runs_op_by_op_and_the_reason_is_given_once(target: Target) -> None:
    def broken(*_: Any) -> Any:
        raise NotImplementedError("no kernel for this")

    torch._dynamo.reset()
    engine = Engine(target, runner=lambda cycle: CompiledRunner(cycle, broken))
    with pytest.warns(UserWarning, match="cannot be compiled .*no kernel for this"):
        first = tokens(engine, GREEDY)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("warnings.warn", lambda *_, **__: pytest.fail("warned twice"))
        assert tokens(engine, GREEDY) == first == tokens(Engine(target), GREEDY)


@dataclass(frozen=True)
class Case:
    """A cycle to compile. The cases pair families and manners of drafting with temperatures, penalties, rules and adapters."""

    drafter: str
    shape: str
    request: GenerationSettings
    rule: LossyRule | None = None


LONG_GREEDY = GenerationSettings(max_new_tokens=50)
LONG_DRAWN = replace(DRAWN, max_new_tokens=50)
LONG_PENALISED = replace(LONG_DRAWN, repetition_penalty=1.2, min_p=0.01)
CASES = [
    Case("redrafter", "1x3", LONG_GREEDY, Divergence(0.5)),
    Case("eagle", "3x3n5", LONG_PENALISED, Typical(0.3)),
    Case("redrafter", "2x3", LONG_GREEDY, Relaxed(0.3, ThoughtMarks(7, 9))),
    Case("eagle", "s2.1", LONG_PENALISED),
    Case("draft LM", "k2.1", LONG_DRAWN),
    Case("adapted", "2x3n4e0.5", LONG_PENALISED),
]


def adapted(target: Target) -> Drafter:
    """A drafter with an adapter of random weights."""
    drafter = ReDrafter.for_target(target.ends, head_init="random")
    add_adapter(drafter, LoraSettings(rank=2), "a")
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for name, parameter in drafter.named_parameters():
            if ".lora_" in name:
                parameter.copy_(0.25 * torch.randn(parameter.shape, generator=generator))
    return drafter.eval()


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.drafter} {case.shape}")
def test_all_cycles_of_a_call_are_one_or_two_graphs_that_emit_the_same_tokens(
    target: Target, drafters: dict[str, Drafter | None], case: Case, recwarn: pytest.WarningsRecorder
) -> None:
    graphs = 0

    def counting(graph: torch.fx.GraphModule, _: list[torch.Tensor]) -> Callable[..., Any]:
        nonlocal graphs
        graphs += 1
        return graph.forward

    torch._dynamo.reset()
    limits = parse_shape(case.shape)
    drafter = adapted(target) if case.drafter == "adapted" else drafters[case.drafter]
    engine = Engine(target, drafter, limits, rule=case.rule, runner=lambda cycle: CompiledRunner(cycle, counting))
    replies = engine.generate(PROMPTS, case.request, num_rows=2)
    op_by_op = Engine(target, drafter, limits, rule=case.rule).generate(PROMPTS, case.request)
    assert [reply.token_ids for reply in replies] == [reply.token_ids for reply in op_by_op]
    assert max(reply.cycles_before + len(reply.accepted) for reply in replies) > 40
    assert 1 <= graphs <= 2
    assert not [warning for warning in recwarn if "op by op" in str(warning.message)]


@pytest.mark.parametrize(
    ("reason", "facts"),
    [
        ("a recurrent state", {"keeps_state": True}),
        ("follow the length", {"factors_follow_length": True}),
        ("several devices", {"model": SimpleNamespace(hf_device_map={"layers.0": 0, "layers.1": 1})}),
    ],
)
def test_what_no_graph_can_hold_is_named(reason: str, facts: dict[str, Any]) -> None:
    usual = {"name": "t", "keeps_state": False, "factors_follow_length": False, "model": SimpleNamespace()}
    assert needs_host(cast(Target, SimpleNamespace(**usual)), None, GREEDY) == ""
    assert reason in needs_host(cast(Target, SimpleNamespace(**{**usual, **facts})), None, GREEDY)


@pytest.mark.skipif(torch.cuda.is_available(), reason="here a capture works")
def test_a_cycle_that_cannot_be_captured_runs_op_by_op_and_the_reason_is_given_once(target: Target) -> None:
    engine = Engine(target, runner=CapturedRunner)
    with pytest.warns(UserWarning, match="cannot be captured"):
        first = tokens(engine, DRAWN)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("warnings.warn", lambda *_, **__: pytest.fail("warned twice"))
        assert tokens(engine, DRAWN) == first == tokens(Engine(target), DRAWN)


def test_attention_that_cannot_be_compiled_attends_to_all_slots_and_the_reason_is_given_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As on CUDA without a compiler for it; the capture fails as well here, and the tokens stay the same."""

    def broken(*_: Any, **__: Any) -> Any:
        raise torch._dynamo.exc.TorchDynamoException("no compiler is there")

    target = random_target()
    expected = tokens(Engine(target), DRAWN)
    monkeypatch.setattr("draftsmith.models.trunk.trunk.skips_blocks", lambda device: True)
    monkeypatch.setattr("draftsmith.models.slots.attention._flex", lambda kind: broken)
    engine = Engine(target, runner=CapturedRunner)
    with pytest.warns(UserWarning, match="attention reads empty slots too: .*no compiler is there"):
        assert tokens(engine, DRAWN) == expected
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("warnings.warn", lambda *_, **__: pytest.fail("warned twice"))
        assert tokens(engine, DRAWN) == expected


def test_another_failure_of_a_compiler_is_raised_and_changes_nothing_of_the_target(
    target: Target, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On this device no attention skips slots, so it is not to blame."""

    def broken(*_: Any, **__: Any) -> Any:
        raise torch._dynamo.exc.TorchDynamoException("a layer cannot be compiled")

    skips = target._trunk.skips_slots
    monkeypatch.setattr(DecodeCycle, "__call__", broken)
    with pytest.raises(torch._dynamo.exc.TorchDynamoException, match="a layer cannot be compiled"):
        tokens(Engine(target, runner=CapturedRunner), DRAWN)
    assert target._trunk.skips_slots == skips


class Other:
    """Some other batch."""


class Emulated:
    """A CUDA graph on a CPU: it repeats the cycle, and writes the report where the first one was."""

    def __init__(self, runners: list[CapturedRunner]) -> None:
        self._runners, self._is_captured = runners, False

    def replay(self) -> None:
        runner = next(runner for runner in self._runners if runner._graph is cast(Any, self))
        batch, settings = runner._batch(), runner._settings
        assert batch is not None
        assert settings is not None
        assert runner._report is not None
        if self._is_captured:  # what emulates the capture has run the cycle already
            runner._report.columns_BC.copy_(runner._cycle(batch, settings).columns_BC)
        self._is_captured = True


@contextmanager
def emulated_capture(graph: Emulated, device: torch.device) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "tensor", lambda *_, **__: pytest.fail("a tensor is made from host data"))
        yield


@pytest.mark.parametrize(("name", "shape"), [("plain", "1x3"), ("redrafter", "k2.1"), ("eagle", "3x3n5")])
def test_a_captured_graph_repeats_a_cycle_and_holds_the_constants_that_it_reads(
    target: Target, drafters: dict[str, Drafter | None], name: str, shape: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    runners: list[CapturedRunner] = []

    def captured(cycle: DecodeCycle) -> Runner:
        runners.append(CapturedRunner(cycle))
        return runners[-1]

    # A copy to the host is a copy, on a GPU.
    monkeypatch.setattr(CycleReport, "to_host", lambda self: replace(self, columns_BC=self.columns_BC.clone()))
    monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: Emulated(runners))
    monkeypatch.setattr("draftsmith.decode.runners._capturing", emulated_capture)
    limits = parse_shape(shape)
    expected = tokens(Engine(target, drafters[name], limits), DRAWN)
    assert tokens(Engine(target, drafters[name], limits, runner=captured), DRAWN, num_rows=2) == expected
    (runner,) = runners
    assert runner._graph is not None
    assert runner._constants
    eager = SimpleNamespace(target=target)
    runner._cycle = cast(DecodeCycle, lambda *_: eager)
    runner(cast(Batch, Other()), DRAWN)
    assert (runner._graph, runner._report, runner._constants) == (None, None, [])


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("shape", ["1x3", "3x3", "3x3n5", "t2.1", "s2.1", "k2.1"])
@pytest.mark.parametrize("name", [*map(name_of, EVERY_FAMILY), "draft LM"])
def test_captured_cycles_emit_the_tokens_of_cycles_run_op_by_op(
    target: Target, drafters: dict[str, Drafter | None], name: str, shape: str
) -> None:
    on_gpu = random_target().to("cuda")
    drafter, limits = copy.deepcopy(drafters[name]), parse_shape(shape)
    assert drafter is not None
    engines = [Engine(on_gpu, drafter.to("cuda"), limits, compile=way) for way in ("off", "on")]
    for request in (DRAWN,) if limits.sampled is not None else (GREEDY, DRAWN):
        op_by_op, captured = (tokens(engine, request, num_rows=2) for engine in engines)
        assert captured == op_by_op
        assert tokens(engines[1], request, num_rows=2) == op_by_op
        if limits.sampled is None:
            assert captured == tokens(Engine(on_gpu, compile="on"), request)
