"""Wide trees over shortlists: the same trees as over the whole vocabulary, DDTree's heap, and no tensor of nodes times vocabulary.

Refined heads are among them. So are drafts of a selector that are no trees, whose steps read the rows of their candidates alone.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
import torch
from every_family import batch_of
from heads import deep_config
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import LlamaForCausalLM

from draftsmith.decode.sampling import GenerationSettings, process
from draftsmith.models import Drafter, DraftLimits, DraftTree, EarlyStop, Target
from draftsmith.models.composed.refined_drafter import RefinedConfig, RefinedDrafter
from draftsmith.models.composed.revisers import NgramReviser
from draftsmith.models.drafters.draft_records import Cycle, DraftState, Emitted, Opening
from draftsmith.models.families.block import BlockDrafter
from draftsmith.models.families.eagle3 import Eagle3
from draftsmith.models.families.heads import HeadsDrafter
from draftsmith.models.ngrams.kneser_ney import kneser_ney
from draftsmith.models.tree.noise import SharedNoise, request_keys
from draftsmith.models.tree.search import search
from draftsmith.models.tree.shortlist import Shortlist, shortlist_of

V, STEPS = 3000, 4
STOP = EarlyStop(scale=0.05)


class FixedSlots:
    """A draft whose slots have fixed logits [K, V]."""

    def __init__(self, logits_KV: Tensor) -> None:
        self.root_B, self._logits_KV, self._depth = torch.tensor([0]), logits_KV, 0

    def begin(self) -> Tensor:
        return self._logits_KV[None, :1]

    def extend(self, tokens_BM: Tensor, above_BM: Tensor) -> Tensor:
        self._depth += 1
        return self._logits_KV[None, self._depth : self._depth + 1].expand(-1, tokens_BM.shape[1], -1)

    def target_ids(self, draft_ids: Tensor) -> Tensor:
        return draft_ids


class ShortSlots(FixedSlots):
    """The same, which knows its slots."""

    def shortlist(self, count: int, scale: float, noise: SharedNoise | None) -> Shortlist | None:
        return shortlist_of(self._logits_KV[None], count, scale)

    def rescore(self, tokens_BM: Tensor, above_BM: Tensor) -> Tensor | None:
        return None


def paths_of(tree: DraftTree) -> list[tuple[int, ...]]:
    paths: list[tuple[int, ...]] = [()]
    for token, parent in zip(tree.tokens_BN[0, 1:].tolist(), tree.parents_BN[0, 1:].tolist(), strict=True):
        paths.append((*paths[parent], token))
    return paths[1:]


def heap_tree(logits_KV: Tensor, budget: int) -> set[tuple[int, ...]]:
    """The ``budget`` likeliest paths by the heap of DDTree (arXiv:2604.12989): a path brings its next sibling and its first child."""
    scores, ids = logits_KV.log_softmax(-1).sort(-1, descending=True)
    heap: list[tuple[float, tuple[int, ...]]] = [(-float(scores[0, 0]), (0,))]
    paths: set[tuple[int, ...]] = set()
    while len(paths) < budget:
        negative, ranks = heapq.heappop(heap)
        paths.add(tuple(int(ids[depth, rank]) for depth, rank in enumerate(ranks)))
        depth, last = len(ranks) - 1, ranks[-1]
        if last + 1 < scores.shape[1]:
            heapq.heappush(
                heap, (negative + float(scores[depth, last] - scores[depth, last + 1]), (*ranks[:-1], last + 1))
            )
        if depth + 1 < len(scores):
            heapq.heappush(heap, (negative - float(scores[depth + 1, 0]), (*ranks, 0)))
    return paths


def noise(seed: int, size: int = 30) -> Tensor:
    return torch.randn(4, size, generator=torch.Generator().manual_seed(seed)) * 2


@pytest.mark.parametrize("kind", [FixedSlots, ShortSlots])
@pytest.mark.parametrize("seed", range(5))
def test_a_dynamic_tree_as_wide_as_its_budget_is_that_of_the_heap(seed: int, kind: type[FixedSlots]) -> None:
    logits_KV, budget = noise(seed), 9
    tree = search(kind(logits_KV), None, DraftLimits(budget, 4, node_budget=budget))
    assert set(paths_of(tree)) == heap_tree(logits_KV, budget)


@pytest.mark.parametrize(
    "limits",
    [
        DraftLimits(3, 4),
        DraftLimits(1, 4),
        DraftLimits(5, 3, node_budget=8),
        DraftLimits(paths=((0,), (2,), (0, 0), (0, 3), (0, 0, 1))),
        DraftLimits(4, 4, node_budget=9, early_stop=STOP),
    ],
)
def test_shortlists_give_the_tree_of_the_whole_vocabulary(limits: DraftLimits) -> None:
    below_B = None if limits.early_stop is None else torch.tensor([0.6])
    for seed in range(4):
        trees = [search(kind(noise(seed)), below_B, limits, score_scale=1.5) for kind in (FixedSlots, ShortSlots)]
        assert paths_of(trees[0]) == paths_of(trees[1])
        torch.testing.assert_close(trees[0].scores_BN, trees[1].scores_BN)


def test_more_continuations_than_tokens_are_an_error() -> None:
    with pytest.raises(
        ValueError, match="31 continuations of a node are asked for, the draft vocabulary has 30 tokens"
    ):
        search(ShortSlots(noise(0)), None, DraftLimits(31, 2))


@pytest.fixture(scope="module")
def target() -> Target:
    config = deep_config()
    config.vocab_size = V
    torch.manual_seed(0)
    return Target.from_model(LlamaForCausalLM(config).eval(), name="wide")


def shaken(drafter: Drafter) -> Drafter:
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in drafter.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
    return drafter.eval()


def drafted(target: Target, drafter: Drafter, limits: DraftLimits, temperature: float = 0.0) -> DraftTree:
    """One draft behind a text; only the draft itself is counted by the caller."""
    state, cycle = begun(target, drafter, limits)
    if temperature:
        request = GenerationSettings(temperature=temperature, top_k=12)
        keys_B = request_keys(3, [0], "choices", torch.device("cpu"))
        noise = SharedNoise(keys_B, torch.tensor([4]), temperature, lambda logits: process(logits, request))
        cycle = replace(cycle, temperature=temperature, noise=noise)
    return drafter.propose(state, cycle, limits)


def begun(target: Target, drafter: Drafter, limits: DraftLimits) -> tuple[DraftState, Cycle]:
    """The state behind a text, and its cycle."""
    batch, root = batch_of(target, drafter), 9
    states = {name: batch.hidden[name][None, :root] for name in drafter.features}
    prompt = Emitted(batch.input_ids[None, 1 : root + 1], states, torch.tensor([root]))
    state = drafter.start(Opening(prompt, batch.input_ids[:1], limits, room=64))
    return state, Cycle(torch.tensor([root]), [root], [root])


class LargestTensor(TorchDispatchMode):
    """The most numbers that any operation makes; views of what it was given make none."""

    def __init__(self) -> None:
        super().__init__()
        self.most = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        given = {tensor.untyped_storage().data_ptr() for tensor in args if isinstance(tensor, Tensor)}
        for tensor in out if isinstance(out, tuple | list) else [out]:
            if isinstance(tensor, Tensor) and tensor.untyped_storage().data_ptr() not in given:
                self.most = max(self.most, tensor.untyped_storage().nbytes() // tensor.itemsize)
        return out


@contextmanager
def whole_vocabulary(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    with monkeypatch.context() as patch:
        patch.setattr("draftsmith.models.drafters.parallel_draft.ParallelDraft.shortlist", lambda *_: None)
        yield


def of_kind(target: Target, kind: str) -> Drafter:
    ends = target.ends
    if kind == "heads":
        return shaken(HeadsDrafter.for_target(ends, num_draft_steps=STEPS))
    if kind == "p-eagle":
        return shaken(Eagle3.for_target(ends, num_draft_steps=STEPS, mask_token_id=V - 1))
    return shaken(
        BlockDrafter.for_target(
            ends,
            layers=["layer.1.output", "layer.5.output"],
            num_draft_steps=STEPS,
            mask_token_id=V - 1,
            correction=kind,  # type: ignore[arg-type]
            correction_rank=6,
            correction_state=6,
        )
    )


@pytest.mark.parametrize("kind", ["none", "heads", "p-eagle", "vanilla", "recurrent", "gru"])
@torch.no_grad()
def test_a_wide_tree_scores_the_vocabulary_once_a_slot_and_not_once_a_node(
    target: Target, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    drafter, limits = of_kind(target, kind), DraftLimits(24, STEPS, node_budget=40)
    nodes_times_vocabulary = 24 * V
    with LargestTensor() as short:
        tree = drafted(target, drafter, limits)
    assert short.most < nodes_times_vocabulary
    with whole_vocabulary(monkeypatch), LargestTensor() as whole:
        same = drafted(target, drafter, limits)
    assert whole.most >= nodes_times_vocabulary, "the count would see such a tensor"
    assert tree.num_nodes == same.num_nodes == 41
    if kind in ("none", "heads", "p-eagle"):
        assert paths_of(tree) == paths_of(same)


@pytest.mark.parametrize("kind", ["vanilla", "gated", "recurrent", "gru"])
@torch.no_grad()
def test_a_shortlist_of_the_whole_vocabulary_gives_its_tree_with_a_correction_too(
    target: Target, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    drafter, limits = of_kind(target, kind), DraftLimits(10, STEPS, node_budget=20)
    monkeypatch.setattr("draftsmith.models.drafters.parallel_draft.FEWEST", V)
    tree = drafted(target, drafter, limits)
    with whole_vocabulary(monkeypatch):
        same = drafted(target, drafter, limits)
    assert paths_of(tree) == paths_of(same)
    torch.testing.assert_close(tree.scores_BN, same.scores_BN, rtol=1e-4, atol=1e-4)


def refined(target: Target, kind: str, num_candidates: int) -> RefinedDrafter:
    """A head, scored again by a table of text that has most of its tokens once."""
    text = torch.randint(0, V, (4 * V,), generator=torch.Generator().manual_seed(3)).tolist()
    config = RefinedConfig(head="head", ngrams="table", alpha=0.7, num_candidates=num_candidates)
    drafter = RefinedDrafter(config, of_kind(target, kind), NgramReviser(kneser_ney([text], V, 2)))
    return drafter.eval().bound(target.ends)


@pytest.mark.parametrize("temperature", [0.0, 0.7])
@pytest.mark.parametrize("num_candidates", [16, 30])
@pytest.mark.parametrize("kind", ["none", "heads", "p-eagle", "vanilla", "recurrent"])
@torch.no_grad()
def test_a_refined_head_gives_the_tree_of_the_whole_vocabulary_and_never_scores_it_at_each_node(
    target: Target, kind: str, num_candidates: int, temperature: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    drafter, limits = refined(target, kind, num_candidates), DraftLimits(24, STEPS, node_budget=40)
    with LargestTensor() as short:
        drafted(target, drafter, limits, temperature)
    assert short.most < 24 * V
    monkeypatch.setattr("draftsmith.models.drafters.parallel_draft.FEWEST", V)
    tree = drafted(target, drafter, limits, temperature)
    with whole_vocabulary(monkeypatch), LargestTensor() as whole:
        same = drafted(target, drafter, limits, temperature)
    assert whole.most >= 24 * V, "the count would see such a tensor"
    assert paths_of(tree) == paths_of(same)
    torch.testing.assert_close(tree.scores_BN, same.scores_BN, rtol=1e-4, atol=1e-4)


class Multiplied(TorchDispatchMode):
    """How many rows the matrices have that are multiplied with others."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.bmm, torch.ops.aten.addmm):
            self.sizes |= {size for tensor in args if isinstance(tensor, Tensor) for size in tensor.shape}
        return func(*args, **(kwargs or {}))


@torch.no_grad()
def test_no_step_of_a_selector_multiplies_with_the_whole_vocabulary_where_each_is_drawn(target: Target) -> None:
    options: dict[str, Any] = {"correction_rank": 6, "candidates": 5, "num_draft_steps": STEPS}
    selector = BlockDrafter.for_target(target.ends, layers=["layer.1.output"], correction="selector", **options)
    limits = DraftLimits(1, STEPS)
    state, cycle = begun(target, shaken(selector), limits)
    expander, first = selector.expander(state, cycle, limits), torch.zeros(1, 1, dtype=torch.int64)
    with Multiplied() as block:
        logits = expander.begin()
    assert V in block.sizes, "the block scores the vocabulary once"
    with Multiplied() as steps:
        for _ in range(STEPS - 1):
            assert int((logits > -torch.inf).sum()) == 5
            logits = expander.extend(expander.target_ids(logits.argmax(-1)), first)
    assert steps.sizes
    assert V not in steps.sizes
