"""A cycle on meta tensors, which have shapes and no numbers: it reads nothing from the device and makes nothing from host data."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import pytest
import torch
from doubles import BOS, VOCAB, family_configs, random_model, random_target
from every_family import EVERY_FAMILY, fresh, name_of
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from draftsmith.decode import Engine, GenerationSettings, Ledger
from draftsmith.decode.batch import Batch, Request
from draftsmith.decode.cycle import DecodeCycle
from draftsmith.decode.prefill import Prefill
from draftsmith.decode.verify.lossy_rule import LossyRule
from draftsmith.decode.verify.lossy_rules import (
    Divergence,
    Ensemble,
    Everything,
    JudgeRule,
    TopK,
    Typical,
    UnsureDivergence,
)
from draftsmith.decode.verify.thoughts import ThoughtMarks
from draftsmith.decode.verify.uncertain_rules import Fly, Margin, Relaxed
from draftsmith.models import Drafter, DraftLimits, EarlyStop, LMDrafter, Target
from draftsmith.models.composed.phrase_drafter import PhraseConfig, PhraseDrafter
from draftsmith.models.composed.refined_drafter import RefinedConfig, RefinedDrafter
from draftsmith.models.composed.revisers import LMReviser, NgramReviser
from draftsmith.models.composed.shared_pool import SharedPool
from draftsmith.models.composed.suffix_drafter import SuffixConfig, SuffixDrafter
from draftsmith.models.judge import WITH_OPINION, Judge, JudgeConfig
from draftsmith.models.lora.lora_adapter import LoraSettings, add_adapter
from draftsmith.models.ngrams.kneser_ney import kneser_ney
from draftsmith.models.target.target import PRE_NORM
from draftsmith.models.tree.shapes import parse_shape

SHAPES = ["1x3", "4x3", "4x3n6", "s2.1", "k2.1"]
TEXTS = [[5, 9, 11, 4, 7, 8, 8, 30, 31], [30, 31, 32, 5, 9, 4, 7, 11, 4, 7]]
VIEWS = {"alias", "detach", "expand", "permute", "select", "slice", "split", "squeeze", "t", "transpose", "unbind"}
VIEWS |= {"_unsafe_view", "as_strided", "split_with_sizes", "unsqueeze", "view"}


class Operations(TorchDispatchMode):
    """Counts the operations inside as kernels of a GPU: views are none; attention with a mask is three, an RMS norm one."""

    def __init__(self) -> None:
        super().__init__()
        self.count: Counter[str] = Counter()

    @contextmanager
    def fused(self) -> Iterator[None]:
        """Count what meta tensors take apart as the kernels that a GPU has for it."""

        def attention(
            query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, *_: Any, **__: Any
        ) -> torch.Tensor:
            self.count["attention"] += 3
            return query.as_strided((*query.shape[:-1], values.shape[-1]), query.stride())

        def norm(states: torch.Tensor, *_: Any) -> torch.Tensor:
            self.count["norm"] += 1
            return states.view_as(states)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(torch.nn.functional, "scaled_dot_product_attention", attention)
            patch.setattr(torch.nn.functional, "rms_norm", norm)
            yield

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        self.count[name] += name not in VIEWS
        return func(*args, **(kwargs or {}))


TOO_MUCH = {torch.Tag.dynamic_output_shape, torch.Tag.data_dependent_output, torch.Tag.nondeterministic_seeded}
"""Of operations whose shapes or numbers the host must know, or that draw from a generator, which a graph would have to know."""
INDEXING = {"index", "index_put", "index_put_"}
"""Their shapes depend on numbers where an index is a mask."""
WITHOUT_KERNEL = {
    torch.bool: {"argmax", "argmin", "sort", "topk", "mm", "bmm", "addmm", "cumprod", "cumsum"},
    torch.int32: {"mm", "bmm", "addmm", "baddbmm"},
    torch.int64: {"mm", "bmm", "addmm", "baddbmm"},
}
"""What CUDA does not compute, or only behind a conversion that nobody counts."""


class CaptureRules(TorchDispatchMode):
    """Refuses what a CUDA graph cannot hold, and what CUDA has no kernel for."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name, tensors = func.overloadpacket.__name__, self._tensors((args, kwargs))
        if name in INDEXING:
            assert not any(index.dtype == torch.bool for index in self._tensors(args[1])), f"{func} asks for a count"
        elif "scaled_dot_product" not in name:  # which draws where it drops out
            assert not TOO_MUCH & set(func.tags), f"{func} cannot be captured"
        for tensor in tensors:
            # A mere number is handed to the kernel with its arguments.
            assert tensor.device.type == "meta" or tensor.ndim == 0, f"{func} reads a tensor of the host"
            assert name not in WITHOUT_KERNEL.get(tensor.dtype, ()), f"CUDA has no {func} of {tensor.dtype}"
        if name == "_foreach_copy_":
            owns, others = args[:2]
            for own, other in zip(owns, others, strict=True):
                assert (own.shape, own.dtype, own.dtype) == (other.shape, other.dtype, owns[0].dtype), "not one kernel"
        result = func(*args, **(kwargs or {}))
        for tensor in self._tensors(result):
            # One without numbers holds a place until there are some.
            assert tensor.device.type == "meta" or tensor.numel() == 0, f"{func} makes a tensor on the host"
        return result

    def _tensors(self, values: Any) -> list[torch.Tensor]:
        return [leaf for leaf in tree_leaves(values) if isinstance(leaf, torch.Tensor)]


class WithoutLists(TorchFunctionMode):
    """Refuses lists as indices. A patched `Tensor.__getitem__` would leave its slot in the class, and `torch.tensor([tensor])` broken."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (torch.Tensor.__getitem__, torch.Tensor.__setitem__):
            parts = args[1] if isinstance(args[1], tuple) else (args[1],)
            assert not any(isinstance(part, list) for part in parts), "a list is an index"
        return func(*args, **(kwargs or {}))


@contextmanager
def as_captured() -> Iterator[None]:
    """Run what is inside as a capture would: by the rules above, and without numbers of the host."""

    def from_host(*_: Any, **__: Any) -> Any:
        raise AssertionError("a tensor is made from host data")

    with pytest.MonkeyPatch.context() as patch, CaptureRules(), WithoutLists():
        for name in ("tensor", "as_tensor", "from_numpy"):
            patch.setattr(torch, name, from_host)
        yield


class OperationLedger(Ledger):
    """Counts the operations of each phase in place of its seconds."""

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        with Operations() as operations, operations.fused():
            yield
        self.seconds[name] += operations.count.total()


@pytest.fixture(scope="module")
def target() -> Target:
    """Merged, as the commands decode with it."""
    target = random_target()
    target.merge()
    return target


@pytest.fixture(scope="module")
def drafters(target: Target) -> dict[str, Drafter | None]:
    families = {name_of(family): fresh(family, target.ends).to("meta") for family in EVERY_FAMILY}
    return {"plain": None, **families, "draft LM": LMDrafter(random_target(seed=3)).eval().to("meta")}


def made_of_others(target: Target) -> dict[str, Drafter]:
    """Drafters made of others or of the text alone, one with a draft vocabulary and one with an adapter."""
    families = {name_of(family): family for family in EVERY_FAMILY}

    def head(name: str, draft_ids: torch.Tensor | None = None) -> Drafter:
        return fresh(families[name], target.ends, draft_ids)

    adapted = head("redrafter")
    add_adapter(adapted, LoraSettings(rank=2), "a")
    refined = {"head": "head", "alpha": 0.7, "num_candidates": 8}
    table, lm = NgramReviser(kneser_ney(TEXTS, VOCAB, 3)), LMReviser(LMDrafter(random_target(seed=3)))
    return {
        "suffixes": SuffixDrafter(SuffixConfig()),
        JOINED: SuffixDrafter(SuffixConfig(), head("eagle"), SharedPool.of(TEXTS, VOCAB)),
        "phrases": PhraseDrafter(PhraseConfig(phrase_length=2)),
        "phrases behind EAGLE": PhraseDrafter(PhraseConfig(phrase_length=2), head("eagle")),
        "ReDrafter with a table": RefinedDrafter(RefinedConfig(**refined, ngrams="table"), head("redrafter"), table),
        "ReDrafter with an LM": RefinedDrafter(RefinedConfig(**refined, lm="small"), head("redrafter"), lm),
        "EAGLE with a draft vocabulary": head("eagle", torch.arange(0, VOCAB, 2)),
        "ReDrafter with an adapter": adapted,
    }


JOINED = "suffixes of a pool, with EAGLE"  # in trees only
OTHERS = [
    "suffixes",
    JOINED,
    "phrases",
    "phrases behind EAGLE",
    "ReDrafter with a table",
    "ReDrafter with an LM",
    "EAGLE with a draft vocabulary",
    "ReDrafter with an adapter",
]


@pytest.fixture(scope="module")
def others(target: Target) -> dict[str, Drafter]:
    return {name: drafter.eval().to("meta") for name, drafter in made_of_others(target).items()}


@pytest.fixture(scope="module")
def on_meta(target: Target, drafters: dict[str, Drafter | None], others: dict[str, Drafter]) -> Target:
    """The target without numbers; the drafters were made from its numbers before."""
    return target.to("meta")


def begun(
    target: Target,
    drafter: Drafter | None,
    limits: DraftLimits,
    request: GenerationSettings,
    rule: LossyRule | None = None,
) -> tuple[DecodeCycle, Batch]:
    """A batch of two rows behind its first cycle, which may make tables and plans."""
    cycle = Engine(target, drafter, limits, rule=rule, runner=lambda own: own)._fixed_cycles[limits]
    requests = [Request(0, [BOS, 5, 6, 7], 0, 20), Request(1, [BOS, 5], 1, 20)]
    batch, _ = Prefill(cycle)(requests, request, room=24)
    cycle(batch, request)
    return cycle, batch


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", ["plain", *map(name_of, EVERY_FAMILY), "draft LM"])
@torch.no_grad()
def test_a_cycle_reads_nothing_and_makes_nothing_from_lists(
    on_meta: Target, drafters: dict[str, Drafter | None], name: str, shape: str
) -> None:
    limits = parse_shape(shape)
    for request in (
        GenerationSettings(max_new_tokens=20, temperature=1.0, top_k=5, top_p=0.9, min_p=0.1, repetition_penalty=1.2),
        *([GenerationSettings(max_new_tokens=20)] if limits.sampled is None else []),
    ):
        cycle, batch = begun(on_meta, drafters[name], limits, request)
        with as_captured():
            report = cycle(batch, request)
        assert report.columns_BC.device.type == "meta"
        assert report.columns_BC.shape == (2, 1 + report.num_slots)


@pytest.mark.parametrize(
    ("name", "shape"),
    [(name, shape) for name in OTHERS for shape in ("1x4", "4x4n6") if name != JOINED or shape != "1x4"],
)
@torch.no_grad()
def test_drafters_made_of_others_read_nothing_either(
    on_meta: Target, others: dict[str, Drafter], name: str, shape: str
) -> None:
    request = GenerationSettings(max_new_tokens=20, temperature=1.0, top_p=0.9, repetition_penalty=1.2)
    cycle, batch = begun(on_meta, others[name], parse_shape(shape), request)
    with as_captured():
        cycle(batch, request)


@torch.no_grad()
def test_an_early_stop_reads_nothing_either(on_meta: Target, drafters: dict[str, Drafter | None]) -> None:
    limits, request = DraftLimits(2, 4, early_stop=EarlyStop()), GenerationSettings(max_new_tokens=20)
    cycle, batch = begun(on_meta, drafters["redrafter"], limits, request)
    with as_captured():
        cycle(batch, request)


@pytest.mark.parametrize(
    ("rule", "shape"),
    [
        *(
            (rule, "4x3n6")
            for rule in (TopK(3), Typical(0.3), Fly(0.3), Margin(0.3), Relaxed(0.3, ThoughtMarks(7, 9)), Everything())
        ),
        *((rule, "1x3") for rule in (Divergence(0.5), UnsureDivergence(0.5), Ensemble(0.7), Fly(0.3))),
    ],
    ids=str,
)
@torch.no_grad()
def test_a_lossy_rule_reads_nothing_either(
    on_meta: Target, drafters: dict[str, Drafter | None], rule: LossyRule, shape: str
) -> None:
    limits, request = parse_shape(shape), GenerationSettings(max_new_tokens=20, temperature=1.0)
    cycle, batch = begun(on_meta, drafters["eagle"], limits, request, rule)
    with as_captured():
        cycle(batch, request)


@pytest.mark.parametrize(("gate", "veto"), [("none", False), ("line", False), ("line", True), ("reply", True)])
@pytest.mark.parametrize("feature", [PRE_NORM, WITH_OPINION])
@torch.no_grad()
def test_a_judge_reads_nothing_either(
    on_meta: Target,
    drafters: dict[str, Drafter | None],
    gate: str,
    veto: bool,
    feature: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: nullcontext())  # which the meta device does not have
    line_ends = [7, 9] if gate == "line" else []
    config = JudgeConfig(on_meta.ends.hidden_size, feature, threshold=0.5, gate=gate, veto=veto, line_end_ids=line_ends)
    request = GenerationSettings(max_new_tokens=20, eos_token_ids=(2,))
    cycle, batch = begun(on_meta, drafters["eagle"], parse_shape("1x4"), request, JudgeRule(Judge(config).eval()))
    with as_captured():
        cycle(batch, request)


@pytest.mark.parametrize(
    "operation",
    [
        lambda numbers: numbers.nonzero(),
        lambda numbers: numbers[numbers > 0],
        lambda numbers: numbers.new_zeros(3).index_put_((numbers > 0,), numbers),
        lambda numbers: numbers + torch.tensor([1.0, 2.0, 3.0]),
        lambda numbers: numbers[[1, 0]],
        lambda numbers: numbers.gather(0, torch.arange(2)),
        lambda numbers: numbers.softmax(-1).multinomial(1),
        lambda numbers: (numbers > 0).sort(),
        lambda numbers: numbers + torch.zeros(3),
        lambda numbers: torch._foreach_copy_([numbers, numbers.long()], [numbers, numbers.long()]),
    ],
)
def test_operations_that_no_graph_can_hold_would_be_noticed(operation: Callable[[torch.Tensor], Any]) -> None:
    with pytest.raises(AssertionError), as_captured():
        operation(torch.empty(3, device="meta"))


# Measured; a change that adds operations outside of the target's layers must say so here and in docs/reference/decoding.md.
MOST = {
    ("plain", "1x3"): (0, 8),
    ("redrafter", "4x5n15"): (100, 25),
    ("eagle", "4x5n15"): (218, 25),
    ("eagle", "10x6n60"): (257, 25),
    ("redrafter", "k4.2.1"): (139, 150),
    ("redrafter", "s4.2.1"): (232, 185),
}


@pytest.mark.parametrize(("name", "shape"), MOST)
@torch.no_grad()
def test_draft_and_accept_take_no_more_operations_than_they_did(
    on_meta: Target, drafters: dict[str, Drafter | None], name: str, shape: str
) -> None:
    draft, accept = operations(on_meta, drafters[name], shape)
    most_draft, most_accept = MOST[name, shape]
    assert 0.9 * most_draft <= draft <= most_draft
    assert 0.9 * most_accept <= accept <= most_accept


@torch.no_grad()
def test_k_seq_takes_fewer_operations_where_the_vocabulary_is_large() -> None:
    """There a digit of its divisor is tried at more points, and two digits are enough."""
    config = family_configs()["llama"]
    config.vocab_size = 2**15
    target = Target.from_model(random_model(config, seed=0), name="large")
    target.merge()
    redrafter = fresh(next(family for family in EVERY_FAMILY if name_of(family) == "redrafter"), target.ends)
    _, accept = operations(target.to("meta"), redrafter.to("meta"), "k4.2.1")
    assert accept <= 132


def operations(target: Target, drafter: Drafter | None, shape: str) -> tuple[float, float]:
    """Those of drafting and of accepting in one cycle."""
    limits, ledger = parse_shape(shape), OperationLedger()
    request = GenerationSettings(max_new_tokens=20, temperature=0.0 if limits.sampled is None else 1.0)
    cycle, batch = begun(target, drafter, limits, request)
    cycle(batch, request, ledger)
    return ledger.seconds["draft"], ledger.seconds["accept"]
