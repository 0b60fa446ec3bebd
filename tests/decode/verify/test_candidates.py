"""Multi-candidate rejection: exact by enumeration, rule by rule and over whole sampled trees, and by a statistical test of the engine."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace

import pytest
import torch
from doubles import BOS, VOCAB, draft, first_cycle, opening, random_target
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from joint_law import chi_square_pvalue
from torch import Tensor

from draftsmith.decode import Engine, GenerationSettings
from draftsmith.decode.verify.block_walk import block_walk
from draftsmith.decode.verify.candidates import Judgement, _points, candidate_walk, judge, num_draws
from draftsmith.models import DraftLimits, DraftTree, EarlyStop, ReDrafter, SampledChildren, Target
from draftsmith.models.tree.limits import Rule
from draftsmith.models.tree.noise import draw, keys_at, request_keys, uniforms
from draftsmith.models.tree.sampled_search import layer_start, sampled_tree
from draftsmith.models.tree.search import Draws
from draftsmith.models.tree.tree import pack, prune

RULES: tuple[Rule, ...] = ("mcsd", "kseq")
PROMPTS = [[BOS, 5, 9, 11, 4], [BOS, 7], [BOS, 8, 8, 8, 30, 31, 32, 33, 34, 35, 36]]


@pytest.fixture(scope="module")
def target() -> Target:
    return random_target()


@pytest.fixture(scope="module")
def drafter(target: Target) -> ReDrafter:
    torch.manual_seed(5)
    return ReDrafter.for_target(target.ends).eval()


def accept_probs(rule: Rule, target_probs: Tensor, draft_probs: Tensor, candidates: Tensor) -> tuple[Tensor, Tensor]:
    """float64 [..., K], how likely each candidate is accepted once the earlier ones were rejected; [..., V], what follows them all."""
    judged = judge(
        rule, torch.stack([normalised(target_probs.double()), normalised(draft_probs.double())], dim=-2), candidates
    )
    missing = judged.missing.clamp(min=0.0)
    law = torch.where(missing.sum(-1, keepdim=True) > 0.0, missing, target_probs)
    return (judged.wanted / judged.drawn).nan_to_num(nan=0.0, posinf=0.0), normalised(law)


def normalised(weights: Tensor) -> Tensor:
    return (weights / weights.sum(-1, keepdim=True)).nan_to_num(nan=0.0)


def law(seed: int, vocab: int, zeros: int = 0) -> Tensor:
    """float64 [V], random, some of it 0."""
    generator = torch.Generator().manual_seed(seed)
    weights = torch.rand(vocab, generator=generator, dtype=torch.float64).pow(3)
    weights[torch.randperm(vocab, generator=generator)[:zeros]] = 0.0
    return weights / weights.sum()


def drawings(rule: Rule, draft_probs: list[float], count: int) -> Iterator[tuple[tuple[int, ...], float]]:
    """Every tuple of candidates with the chance to be drawn; 0 pads where nothing is left to draw."""
    if count == 0:
        yield (), 1.0
        return
    total = sum(draft_probs)
    if total == 0.0:
        yield (0,) * count, 1.0
        return
    for token, weight in enumerate(draft_probs):
        if weight > 0.0:
            left = list(draft_probs)
            if rule == "mcsd":
                left[token] = 0.0
            for others, chance in drawings(rule, left, count - 1):
                yield (token, *others), weight / total * chance


def emitted_law(rule: Rule, target_probs: Tensor, draft_probs: Tensor, count: int) -> Tensor:
    """float64 [V]: what is emitted at one node, summed over all drawings and all outcomes of the rule."""
    cases = list(drawings(rule, draft_probs.tolist(), count))
    candidates = torch.tensor([tokens for tokens, _ in cases])
    chances = torch.tensor([chance for _, chance in cases], dtype=torch.float64)
    shape = (len(cases), target_probs.shape[0])
    accept, residual = accept_probs(rule, target_probs.expand(shape), draft_probs.expand(shape), candidates)
    reached = torch.cat([chances[:, None], chances[:, None] * (1.0 - accept).cumprod(-1)], dim=-1)
    emitted = (reached[:, -1:] * residual).sum(0)
    return emitted.index_add(0, candidates.flatten(), (reached[:, :-1] * accept).flatten())


def distance(one: Tensor, other: Tensor) -> float:
    return float((one - other).abs().sum() / 2)


PAIRS = {
    "random": (law(0, 4), law(1, 4)),
    "zeros in the draft": (law(2, 5), law(3, 5, zeros=2)),
    "zeros in the target": (law(4, 4, zeros=2), law(5, 4)),
    "equal": (law(6, 4), law(6, 4)),
    "disjoint": (torch.tensor([0.3, 0.7, 0, 0], dtype=torch.float64), torch.tensor([0, 0, 0.5, 0.5], dtype=torch.float64)),
    "one certain draft": (law(7, 3), torch.tensor([0.0, 1.0, 0.0], dtype=torch.float64)),
    "one certain target": (torch.tensor([0.0, 1.0, 0.0], dtype=torch.float64), law(8, 3)),
    "nearly equal": (law(9, 5), law(9, 5) + torch.tensor([1e-15, -1e-15, 0, 0, 0], dtype=torch.float64)),
    "tiny overlap": (
        torch.tensor([1.0 - 1e-12, 1e-12, 0.0], dtype=torch.float64),
        torch.tensor([1e-13, 0.0, 1.0 - 1e-13], dtype=torch.float64),
    ),
}  # fmt: skip


@pytest.mark.parametrize("pair", PAIRS)
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("count", [1, 2, 3])
def test_a_node_emits_the_targets_distribution_by_enumeration(rule: Rule, count: int, pair: str) -> None:
    target_probs, draft_probs = PAIRS[pair]
    assert distance(emitted_law(rule, target_probs, draft_probs, count), target_probs) < 1e-12


@settings(max_examples=150, deadline=None)
@given(
    weights=st.integers(2, 5).flatmap(
        lambda vocab: st.tuples(
            *[st.lists(st.one_of(st.just(0.0), st.floats(1e-6, 1.0)), min_size=vocab, max_size=vocab)] * 2
        )
    ),
    count=st.integers(1, 3),
    rule=st.sampled_from(RULES),
)
def test_any_two_distributions_give_the_targets(
    weights: tuple[list[float], list[float]], count: int, rule: Rule
) -> None:
    assume(sum(weights[0]) > 0.0 and sum(weights[1]) > 0.0)
    target_probs, draft_probs = (torch.tensor(one, dtype=torch.float64) for one in weights)
    target_probs, draft_probs = target_probs / target_probs.sum(), draft_probs / draft_probs.sum()
    assert distance(emitted_law(rule, target_probs, draft_probs, count), target_probs) < 1e-12


def test_the_chain_is_one_candidate_of_either_rule_and_has_the_textbook_numbers() -> None:
    target_probs, draft_probs = torch.tensor([0.5, 0.5]), torch.tensor([0.75, 0.25])
    for rule in RULES:
        for token, chance in ((0, 2 / 3), (1, 1.0)):
            accept, residual = accept_probs(rule, target_probs, draft_probs, torch.tensor([token]))
            torch.testing.assert_close(accept, torch.tensor([chance], dtype=torch.float64), rtol=1e-12, atol=0.0)
            assert residual.tolist() == [0.0, 1.0]


def test_the_second_candidate_without_replacement_is_judged_by_what_is_left() -> None:
    """Once token 0 is rejected, the target's rest is (0, 0.05, 0.20) / 0.25 and the draft's (0, 0.25, 0.25) / 0.5."""
    target_probs = torch.tensor([0.25, 0.30, 0.45], dtype=torch.float64)
    draft_probs = torch.tensor([0.50, 0.25, 0.25], dtype=torch.float64)
    accept, residual = accept_probs("mcsd", target_probs, draft_probs, torch.tensor([0, 1]))
    torch.testing.assert_close(accept, torch.tensor([0.5, 0.2 / 0.5], dtype=torch.float64))
    torch.testing.assert_close(residual, torch.tensor([0.0, 0.0, 1.0], dtype=torch.float64))


@pytest.mark.parametrize("rule", RULES)
def test_draws_from_the_targets_own_distribution_are_accepted_always(rule: Rule) -> None:
    probs = law(11, 5)
    accept, _ = accept_probs(rule, probs.expand(5, 5), probs.expand(5, 5), torch.arange(5)[:, None].expand(-1, 2))
    torch.testing.assert_close(accept[:, 0], torch.ones(5, dtype=torch.float64), rtol=0.0, atol=1e-9)


@pytest.mark.parametrize("rule", RULES)
def test_more_candidates_are_accepted_more_often(rule: Rule) -> None:
    target_probs, draft_probs = law(12, 5), law(13, 5)
    accepted = []
    for count in (1, 2, 3):
        cases = list(drawings(rule, draft_probs.tolist(), count))
        candidates = torch.tensor([tokens for tokens, _ in cases])
        shape = (len(cases), 5)
        accept, _ = accept_probs(rule, target_probs.expand(shape), draft_probs.expand(shape), candidates)
        chances = torch.tensor([chance for _, chance in cases], dtype=torch.float64)
        accepted.append(1.0 - float((chances * (1.0 - accept).prod(-1)).sum()))
    assert accepted[0] == pytest.approx(float(torch.minimum(target_probs, draft_probs).sum()))
    assert accepted[0] < accepted[1] < accepted[2] < 1.0


@pytest.mark.parametrize("count", [2, 3, 8])
def test_k_seq_divides_by_the_smallest_rho_that_is_exact(count: int) -> None:
    """(1 - (1 - beta)^K) / beta = rho at the rho that the chances betray."""
    target_probs, draft_probs = law(14, 5), law(15, 5)
    token = int((target_probs / draft_probs).argmin())
    accept, _ = accept_probs("kseq", target_probs, draft_probs, torch.tensor([token] * count))
    rho = float(target_probs[token] / draft_probs[token] / accept[0])
    beta = float(torch.minimum(draft_probs, target_probs / rho).sum())
    assert 1.0 < rho < count
    assert (1 - (1 - beta) ** count) / beta == pytest.approx(rho, rel=1e-8)


@pytest.mark.parametrize("count", [2, 3, 8])
def test_a_large_vocabulary_finds_the_same_rho_in_fewer_and_longer_digits(count: int) -> None:
    both = torch.stack([law(14, 5), law(15, 5)])
    accept = judge("kseq", both, torch.arange(count) % 5)
    wide = judge("kseq", torch.nn.functional.pad(both, (0, 2**15)), torch.arange(count) % 5)
    torch.testing.assert_close(wide.wanted, accept.wanted, rtol=1e-8, atol=0.0)
    torch.testing.assert_close(wide.missing[:5], accept.missing, rtol=0.0, atol=1e-8)


def test_a_node_whose_children_are_all_padding_emits_the_targets_distribution() -> None:
    probs = law(16, 4)
    for rule in RULES:
        accept, residual = accept_probs(rule, probs, torch.zeros(4), torch.tensor([3, 3]))
        assert accept.tolist() == [0.0, 0.0]
        torch.testing.assert_close(residual, probs)


@dataclass
class TableExpander:
    """Draft distributions that depend on depth and token only: ``tables[depth][token]``, the root's token being 0."""

    tables: list[Tensor]
    rows: int
    depth: int = 0

    @property
    def root_B(self) -> Tensor:
        return torch.zeros(self.rows, dtype=torch.int64)

    def begin(self) -> Tensor:
        return self.tables[0][torch.zeros(self.rows, 1, dtype=torch.int64)]

    def extend(self, tokens_BM: Tensor, above_BM: Tensor) -> Tensor:
        self.depth += 1
        return self.tables[self.depth][tokens_BM]

    def target_ids(self, draft_ids: Tensor) -> Tensor:
        return draft_ids


def keys_of(noise: Tensor) -> Tensor:
    """Noise keys whose uniforms are these numbers in [0, 1), to 52 bits."""
    return (noise * 2**52).long() << 12


def inverted(weights: Tensor, keys: Tensor) -> Tensor:
    """A draw by inverting the cumulative distribution: what can be integrated exactly, cell by cell."""
    cumulative = weights.cumsum(-1, dtype=torch.float64)
    chosen = torch.searchsorted(cumulative, uniforms(keys) * cumulative[..., -1:], right=True)
    return chosen.clamp_(max=weights.shape[-1] - 1)


def grid(breakpoints: list[Iterable[float]]) -> tuple[Tensor, Tensor]:
    """One point of every cell into which breakpoints cut the unit cube (one list a dimension), and the cells' volumes.

    What is constant between breakpoints is integrated exactly by it.
    """
    middles, widths = [], []
    for cuts in breakpoints:
        edges = sorted({0.0, 1.0, *(float(cut) for cut in cuts if 0.0 < cut < 1.0)})
        middles.append(torch.tensor([(a + b) / 2 for a, b in itertools.pairwise(edges)], dtype=torch.float64))
        widths.append(torch.tensor([b - a for a, b in itertools.pairwise(edges)], dtype=torch.float64))
    points = torch.stack([part.flatten() for part in torch.meshgrid(*middles, indexing="ij")], dim=-1)
    volumes = torch.stack([part.flatten() for part in torch.meshgrid(*widths, indexing="ij")], dim=-1).prod(-1)
    return points, volumes


def cuts_of(weights: Tensor) -> list[float]:
    return (weights.double().cumsum(-1) / weights.double().sum(-1, keepdim=True)).flatten().tolist()


def drafting_cuts(sampled: SampledChildren, tables: list[Tensor]) -> list[Iterable[float]]:
    """Where the uniform of each drafted node, in node order, can change what is drawn."""
    cuts: list[Iterable[float]] = []
    for depth, count in enumerate(sampled.children):
        possible = tables[depth][:1] if depth == 0 else tables[depth]
        parents = 1 if depth == 0 else sampled.widths[depth - 1]
        by_order: list[Iterable[float]] = []
        for order in range(count):
            gone = [()] if sampled.rule == "kseq" else list(itertools.combinations(range(possible.shape[1]), order))
            left = [possible.clone().index_fill_(1, torch.tensor(which, dtype=torch.int64), 0.0) for which in gone]
            by_order.append([cut for weights in left for row in weights if row.sum() > 0 for cut in cuts_of(row)])
        cuts += by_order * parents
    return cuts


def walk_cuts(sampled: SampledChildren, tree: DraftTree, laws_NV: Tensor) -> list[Iterable[float]]:
    """Where the uniforms of a walk down one tree can change its way."""
    cuts: list[Iterable[float]] = []
    last = cuts_of(laws_NV)
    assert tree.draft_probs_BMV is not None
    for depth, count in enumerate(sampled.children):
        nodes = range(layer_start(sampled, depth), layer_start(sampled, depth + 1))
        chances = []
        for place, node in enumerate(nodes):
            children = layer_start(sampled, depth + 1) + place * count
            candidates = tree.tokens_BN[0, children : children + count]
            accept, residual = accept_probs(sampled.rule, laws_NV[node], tree.draft_probs_BMV[0, node], candidates)
            chances.append(accept.tolist())
            last += cuts_of(residual)
        cuts += [list(at_one) for at_one in zip(*chances, strict=True)]
    return [*cuts, last]


def continued(laws: list[Tensor], level: int, token: int) -> Tensor:
    """The joint law of all tokens from a level on, after a token: one dimension a token."""
    if level == len(laws):
        return torch.ones((), dtype=torch.float64)
    rest = torch.stack([continued(laws, level + 1, nxt) for nxt in range(laws[level].shape[1])])
    return laws[level][token].view(-1, *[1] * (rest.ndim - 1)) * rest


class SureExpander(TableExpander):
    """A draft that says how likely a continuation will be accepted: by the token before it alone."""

    chances = torch.tensor([0.9, 0.2, 0.7])
    tokens_BM: Tensor

    def begin(self) -> Tensor:
        self.tokens_BM = torch.zeros(self.rows, 1, dtype=torch.int64)
        return super().begin()

    def extend(self, tokens_BM: Tensor, above_BM: Tensor) -> Tensor:
        self.tokens_BM = tokens_BM
        return super().extend(tokens_BM, above_BM)

    def acceptance(self) -> Tensor:
        return self.chances[self.tokens_BM]


def joint_distance(sampled: SampledChildren, zeros: int, stop: EarlyStop | None = None, peeks: bool = False) -> float:
    """How far what sampled trees emit is from the target's joint law of one token more than they are deep.

    It integrates over every uniform of drafting and of the walk.

    Args:
        sampled: the trees.
        zeros: how many tokens the drafter never says.
        stop: where the drafter is not sure, the draft ends.
        peeks: drop a drawn token for what it is, which no rule may do.
    """
    vocab, depth = 3, len(sampled.children)
    laws = [torch.stack([law(100 * level + token, vocab) for token in range(vocab)]) for level in range(depth + 1)]
    tables = [
        torch.stack([law(900 + 100 * level + token, vocab, zeros) for token in range(vocab)]) for level in range(depth)
    ]
    noise_BU, volume_B = grid(drafting_cuts(sampled, tables))
    draws = Draws(keys_of(noise_BU), lambda weights: weights, inverted)
    limits = DraftLimits(sampled=sampled, early_stop=stop)
    below_B = None if stop is None else torch.full((len(noise_BU),), stop.threshold)
    trees = sampled_tree(SureExpander(tables, len(noise_BU)), below_B, limits, draws, vocab, cut=False)
    if peeks and trees.draft_probs_BMV is not None:
        kept_B = trees.tokens_BN[:, 1] != 1
        trees = replace(trees, draft_probs_BMV=trees.draft_probs_BMV * kept_B[:, None, None])
    shapes, which_B = torch.stack([trees.tokens_BN, trees.valid_BN.long()], -1).unique(dim=0, return_inverse=True)
    joint = torch.zeros((vocab,) * (depth + 1), dtype=torch.float64)
    for number in range(len(shapes)):
        members = (which_B == number).nonzero().squeeze(1)
        tree = trees.select_rows(members[:1])
        nodes = zip(tree.depths_BN[0].tolist(), tree.tokens_BN[0].tolist(), strict=True)
        laws_NV = torch.stack([laws[level][token] for level, token in nodes])
        points, volumes = grid(walk_cuts(sampled, tree, laws_NV))
        rows = torch.zeros(len(points), dtype=torch.int64)
        laws_BNV = laws_NV.expand(len(rows), -1, -1)
        steps = candidate_walk(tree.select_rows(rows), sampled, laws_BNV, keys_of(points), inverted)
        for length in range(1, depth + 2):
            ended = steps.counts_B == length
            block = torch.zeros((vocab,) * length, dtype=torch.float64)
            block.index_put_(steps.emitted_BE[ended, :length].unbind(1), volumes[ended], accumulate=True)
            rest = torch.stack([continued(laws, length, token) for token in range(vocab)])
            joint += float(volume_B[members].sum()) * block[(..., *[None] * (depth + 1 - length))] * rest
    assert float(joint.sum()) == pytest.approx(1.0, abs=1e-12)
    return distance(joint, continued(laws, 0, 0))


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("children", [(1, 1), (2, 1), (1, 2), (3,)])
@pytest.mark.parametrize("zeros", [0, 1, 2])
def test_whole_sampled_trees_emit_the_targets_joint_law_by_exact_integration(
    rule: Rule, children: tuple[int, ...], zeros: int
) -> None:
    assert joint_distance(SampledChildren(children, rule), zeros) < 1e-12


@pytest.mark.parametrize(("rule", "children"), [("mcsd", (1, 1)), ("mcsd", (2, 1)), ("kseq", (1, 2))])
def test_drafts_that_end_where_the_drafter_is_not_sure_emit_the_targets_joint_law(
    rule: Rule, children: tuple[int, ...]
) -> None:
    assert joint_distance(SampledChildren(children, rule), 0, EarlyStop(0.5)) < 1e-12


def test_a_draft_that_ends_because_of_the_token_just_drawn_would_not() -> None:
    """The test above can fail: tokens are dropped for what they are."""
    assert joint_distance(SampledChildren((1,)), 0, peeks=True) > 0.01


def test_children_lie_side_by_side_behind_the_layer_of_their_parents() -> None:
    sampled = SampledChildren((3, 2))
    assert [layer_start(sampled, depth) for depth in range(3)] == [0, 1, 4]
    tables = [law(20, 7).expand(7, 7), torch.stack([law(21 + token, 7) for token in range(7)])]
    keys_BU = keys_at(torch.arange(4)[:, None], torch.arange(9))
    tree = sampled_tree(TableExpander(tables, 4), None, DraftLimits(sampled=sampled), Draws(keys_BU, lambda w: w), 7)
    assert tree.parents_BN.tolist() == [[-1, 0, 0, 0, 1, 1, 2, 2, 3, 3]] * 4
    assert tree.depths_BN.tolist() == [[0, 1, 1, 1, 2, 2, 2, 2, 2, 2]] * 4
    assert tree.draft_probs_BMV is not None
    for row in range(4):
        assert len(set(tree.tokens_BN[row, 1:4].tolist())) == 3
        for node in range(1, 4):
            token = int(tree.tokens_BN[row, node])
            torch.testing.assert_close(tree.draft_probs_BMV[row, node], tables[1][token])
            first = 4 + (node - 1) * 2
            assert int(tree.tokens_BN[row, first]) == int(draw(tables[1][token], keys_BU[row, first - 1 : first]))


def test_with_replacement_siblings_repeat_and_without_it_they_run_out() -> None:
    certain = torch.tensor([0.0, 1.0, 0.0]).expand(3, 3)
    keys_BU = torch.arange(4)[None]
    repeated, run_out = (
        sampled_tree(
            TableExpander([certain, certain], 1),
            None,
            DraftLimits(sampled=SampledChildren((2, 1), rule)),
            Draws(keys_BU, lambda weights: weights),
            3,
        )
        for rule in ("kseq", "mcsd")
    )
    assert repeated.tokens_BN.tolist() == [[0, 1, 1, 1, 1]]
    assert repeated.valid_BN.all()
    assert run_out.valid_BN.tolist() == [[True, True, False, True, False]]
    assert run_out.depths_BN.tolist() == [[0, 1, 0, 2, 0]]
    assert run_out.parents_BN.tolist() == [[-1, 0, 0, 1, 0]]


def test_a_small_draft_vocabulary_is_drawn_from_and_told_in_target_ids(target: Target) -> None:
    ids = torch.tensor([3, 5, 6, 20, 21, 40])
    torch.manual_seed(2)
    drafter = ReDrafter.for_target(target.ends, draft_token_ids=ids)
    limits = DraftLimits(sampled=SampledChildren((3, 2)))
    start = opening(target, [[BOS, 5, 9]], limits, drafter.features)
    draws = Draws(torch.arange(9)[None], lambda logits: logits.softmax(-1))
    with torch.inference_mode():
        tree = drafter.propose(drafter.start(start), replace(first_cycle(start), draws=draws), limits)
    assert set(tree.tokens_BN[0, 1:].tolist()) <= set(ids.tolist())
    assert tree.draft_probs_BMV is not None
    assert tree.draft_probs_BMV.shape == (1, 4, VOCAB)
    torch.testing.assert_close(tree.draft_probs_BMV.sum(-1), torch.ones(1, 4))
    assert tree.draft_probs_BMV[0].sum(0).nonzero().squeeze(1).tolist() == ids.tolist()


def test_a_sampled_tree_is_never_packed_and_never_pruned() -> None:
    tables = [law(20, 5).expand(5, 5)]
    draws = Draws(torch.arange(4).view(2, 2), lambda weights: weights)
    tree = sampled_tree(TableExpander(tables, 2), None, DraftLimits(sampled=SampledChildren((2,))), draws, 5)
    with pytest.raises(AssertionError, match="keeps its shape"):
        pack(tree)
    with pytest.raises(ValueError, match="gives no scores, so its tree cannot be pruned"):
        prune(tree, 1)
    for limits in ({"node_budget": 3}, {"min_probability": 0.1}):
        with pytest.raises(ValueError, match="a sampled tree cannot be pruned by score"):
            DraftLimits(sampled=SampledChildren((2,)), **limits)  # type: ignore[arg-type]


SHAPES = [
    SampledChildren((1, 1, 1)),
    SampledChildren((3, 2)),
    SampledChildren((3, 2), "kseq"),
    SampledChildren((1, 1, 1), "block"),
]
SHAPE_NAMES = ["chain", "mcsd", "kseq", "block"]


@pytest.mark.parametrize("sampled", SHAPES, ids=SHAPE_NAMES)
@pytest.mark.parametrize(
    "request_settings",
    [
        GenerationSettings(max_new_tokens=3, temperature=1.0, top_k=3, seed=11),
        GenerationSettings(max_new_tokens=3, temperature=1.5, top_k=3, repetition_penalty=1.8, seed=12),
    ],
    ids=["top-k", "top-k+penalty"],
)
def test_the_engines_joint_of_three_tokens_passes_a_chi_square_test(
    target: Target, drafter: ReDrafter, sampled: SampledChildren, request_settings: GenerationSettings
) -> None:
    engine = Engine(target, drafter, DraftLimits(sampled=sampled))
    assert chi_square_pvalue(engine, [BOS, 5, 9], request_settings, num_draws=3000) > 1e-3


def test_the_chi_square_test_sees_a_drafter_that_is_believed_blindly(
    target: Target, drafter: ReDrafter, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The test above can fail: it sees it when all that is drawn is accepted."""

    def all_accepted(rule: Rule, both: Tensor, candidates: Tensor) -> Judgement:
        judged = judge(rule, both, candidates)
        return judged._replace(wanted=judged.drawn)

    monkeypatch.setattr("draftsmith.decode.verify.candidates.judge", all_accepted)
    request_settings = GenerationSettings(max_new_tokens=3, temperature=1.0, top_k=3, seed=11)
    engine = Engine(target, drafter, DraftLimits(sampled=SampledChildren((1, 1, 1))))
    assert chi_square_pvalue(engine, [BOS, 5, 9], request_settings, num_draws=3000) < 1e-6


@pytest.mark.parametrize("sampled", SHAPES, ids=SHAPE_NAMES)
@pytest.mark.parametrize("stop", [None, EarlyStop(threshold=0.6)], ids=["whole", "early stop"])
def test_a_row_of_a_batch_samples_what_it_would_alone(
    target: Target, drafter: ReDrafter, sampled: SampledChildren, stop: EarlyStop | None
) -> None:
    request_settings = GenerationSettings(max_new_tokens=14, temperature=0.8, top_k=4, repetition_penalty=1.2, seed=8)
    engine = Engine(target, drafter, DraftLimits(sampled=sampled, early_stop=stop))
    together = engine.generate(PROMPTS, request_settings)
    assert sum(sum(one.accepted) for one in together) > 0
    for number, prompt in enumerate(PROMPTS):
        alone = engine.generate([prompt], request_settings, request_ids=[number])[0]
        assert (alone.token_ids, alone.accepted) == (together[number].token_ids, together[number].accepted)
    other = replace(request_settings, seed=9)
    assert [one.token_ids for one in engine.generate(PROMPTS, other)] != [one.token_ids for one in together]


@pytest.mark.parametrize(("rule", "children"), [*itertools.product(RULES, [(1, 1, 1), (3, 2)]), ("block", (1, 1, 1))])
@pytest.mark.parametrize("first", [0, 1])
def test_a_draft_distribution_of_nan_leaves_the_targets_own(rule: Rule, children: tuple[int, ...], first: int) -> None:
    """As of a drafter that overflows, at all nodes or below the root only."""
    sampled, rows, vocab = SampledChildren(children, rule), 400, 6
    tables = [law(30 + depth, vocab).expand(vocab, vocab).clone() for depth in range(len(children))]
    for table in tables[first:]:
        table[:] = torch.nan
    keys_BU = keys_at(torch.arange(rows)[:, None], torch.arange(40))
    num_nodes = layer_start(sampled, len(children) + 1) - 1
    draws = Draws(keys_BU[:, :num_nodes], lambda weights: weights)
    tree = sampled_tree(TableExpander(tables, rows), None, DraftLimits(sampled=sampled), draws, vocab)
    target_probs = law(40, vocab)
    target_BNV = target_probs.expand(rows, tree.num_nodes, vocab)
    walk_BU = keys_BU[:, 40 - num_draws(sampled) :]
    by_block = rule == "block"
    walk = block_walk(tree, target_BNV, walk_BU) if by_block else candidate_walk(tree, sampled, target_BNV, walk_BU)
    assert int(walk.counts_B.max()) <= first + 1
    if first == 0:
        assert torch.equal(walk.final_B1, draw(target_probs.expand(rows, vocab), walk_BU[:, -1:]))
    share = torch.bincount(walk.emitted_BE[:, 0], minlength=vocab) / rows
    assert distance(share, target_probs) < 0.1


def test_all_numbers_of_rows_up_to_a_power_of_two_share_the_points_of_k_seq() -> None:
    points = [_points((rows,), 8, 0.25, 3.0, torch.device("cpu")) for rows in (5, 8, 6)]
    assert [part.shape for part in points] == [(5, 8), (8, 8), (6, 8)]
    assert len({part.data_ptr() for part in points}) == 1
    assert all(part.is_contiguous() for part in points)
    for part in points:
        assert torch.equal(part, torch.arange(2.75, 0.9, -0.25, dtype=torch.float64).expand(len(part), 8))


def test_an_early_stop_leaves_padding_below_the_nodes_it_stops_at() -> None:
    """Token 1 is followed by a certain token, token 2 by a draw among five equals, which is stopped at; the root never is."""
    flat, certain = torch.full((5,), 0.2), torch.tensor([0.0, 0.0, 0.0, 1.0, 0.0])
    tables = [
        torch.tensor([0.0, 0.5, 0.5, 0.0, 0.0]).log().expand(5, 5),
        torch.stack([flat, certain, flat, flat, flat]).log(),
    ]
    limits = DraftLimits(sampled=SampledChildren((2, 1)), early_stop=EarlyStop())
    draws = Draws(keys_of(torch.full((2, 4), 0.1)), lambda logits: logits.softmax(-1), inverted)
    tables[1] = tables[1].clamp(min=-1e4)
    tree = sampled_tree(TableExpander(tables, 2), torch.tensor([0.5, 0.0]), limits, draws, 5)
    assert tree.tokens_BN[:, 1:3].tolist() == [[1, 2]] * 2
    assert tree.valid_BN.tolist() == [[True, True, True, True, False], [True] * 5]
    assert tree.draft_probs_BMV is not None
    assert tree.draft_probs_BMV[0, 2].tolist() == [0.0] * 5


def test_a_sampled_tree_at_temperature_0_is_refused_before_anything_is_read(target: Target, drafter: ReDrafter) -> None:
    engine = Engine(target, drafter, DraftLimits(sampled=SampledChildren((2, 1))))
    with pytest.raises(ValueError, match=r"temperature is 0 and the draft tree is sampled.*draft with beams"):
        engine.generate(PROMPTS, GenerationSettings(temperature=0.0))
    with pytest.raises(ValueError, match=r"sampled tree is asked for without draws.*at temperature 0 draft with beams"):
        draft(target, drafter, [[BOS, 5, 9]], engine.limits)


def test_cycles_have_keys_of_their_own_by_seed_request_and_position() -> None:
    sampled = SampledChildren((3, 2))
    assert num_draws(sampled) == 6
    device = torch.device("cpu")
    keys_BPU = torch.stack(
        [
            keys_at(
                keys_at(request_keys(seed, [2, 3], stream, device)[:, None], torch.arange(8))[..., None],
                torch.arange(15),
            )
            for seed in (1, 2)
            for stream in ("choices", "cycles")
        ]
    )
    assert keys_BPU.unique().numel() == keys_BPU.numel()
