"""A head whose candidates are scored again by a table or an LM: the scores, exactness, and the folder that describes it."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from doubles import BOS, VOCAB, first_cycle, opening, random_target
from every_family import EVERY_FAMILY, fresh
from joint_law import chi_square_pvalue
from torch import Tensor

from draftsmith.decode import Engine, GenerationSettings
from draftsmith.decode.runners import CompiledRunner
from draftsmith.models import BlockDrafter, Drafter, DraftLimits, Eagle3, EarlyStop, LMDrafter, SampledChildren, Target
from draftsmith.models.composed.refined_drafter import RefinedConfig, RefinedDrafter
from draftsmith.models.composed.revisers import LMReviser, NgramReviser
from draftsmith.models.drafters.drafter_folder import drafter_fingerprint, load_drafter
from draftsmith.models.ngrams.kneser_ney import kneser_ney
from draftsmith.models.tree.shapes import parse_shape

PROMPTS = [[BOS, 5, 9, 11, 4], [BOS, 7], [BOS, 8, 8, 8, 30, 31, 32]]
TEXTS = [[5, 9, 11, 4, 7, 8, 8, 30, 31], [30, 31, 32, 5, 9, 4, 7, 11, 4, 7]]
ALPHA = 0.7


@pytest.fixture(scope="module")
def lm() -> Target:
    return random_target()


def head_of(lm: Target) -> Drafter:
    return fresh(next(family for family in EVERY_FAMILY if family.name == "redrafter"), lm.ends)


def by_table(lm: Target, alpha: float = ALPHA, num_candidates: int = 8) -> RefinedDrafter:
    config = RefinedConfig(head="head", ngrams="table", alpha=alpha, num_candidates=num_candidates)
    return RefinedDrafter(config, head_of(lm), NgramReviser(kneser_ney(TEXTS, VOCAB, 3))).eval()


def by_lm(lm: Target) -> RefinedDrafter:
    config = RefinedConfig(head="head", lm="small", alpha=ALPHA, num_candidates=8)
    return RefinedDrafter(config, head_of(lm), LMReviser(LMDrafter(random_target(seed=3)))).eval()


KINDS = {"table": by_table, "LM": by_lm}


@torch.inference_mode()
def test_candidates_get_the_tables_opinion_of_their_own_path_and_others_nothing(lm: Target) -> None:
    refined, head, limits = by_table(lm).bound(lm.ends), head_of(lm).bound(lm.ends), DraftLimits(2, 3)
    start = opening(lm, [[BOS, 5, 9, 11], [BOS, 8, 30, 31]], limits, head.features)
    own = refined.expander(refined.start(start), first_cycle(start), limits)
    plain = head.expander(head.start(start), first_cycle(start), limits)
    table = kneser_ney(TEXTS, VOCAB, 3)
    layers = [(None, None), (torch.tensor([[4, 7], [32, 8]]), torch.tensor([[0, 0], [0, 0]]))]
    layers.append((torch.tensor([[7, 11], [5, 5]]), torch.tensor([[0, 1], [1, 0]])))
    paths = [[[5, 9, 11]], [[5, 9, 11, 4], [5, 9, 11, 7]], [[5, 9, 11, 4, 7], [5, 9, 11, 7, 11]]]
    for (tokens, above), contexts in zip(layers, paths, strict=True):
        if tokens is None or above is None:
            scored, logits = own.begin(), plain.begin()
        else:
            scored, logits = own.extend(tokens, above), plain.extend(tokens, above)
        for node, context in enumerate(contexts):  # of the first row
            expected = logits[0, node].log_softmax(-1)
            kept = expected.topk(8).indices
            opinion = table.log_prob(table.context_of(torch.tensor([context[-2:]])), torch.arange(VOCAB))
            torch.testing.assert_close(scored[0, node, kept], (expected + ALPHA * opinion)[kept], rtol=1e-4, atol=1e-4)
            assert int((scored[0, node] > -torch.inf).sum()) == 8


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", ["1x4", "3x3n6", "t2.1"])
def test_replies_stay_the_targets_own(lm: Target, kind: str, shape: str) -> None:
    for request in (
        GenerationSettings(max_new_tokens=16),
        GenerationSettings(max_new_tokens=16, temperature=0.9, seed=2),
    ):
        expected = [each.token_ids for each in Engine(lm).generate(PROMPTS, request)]
        results = Engine(lm, KINDS[kind](lm), parse_shape(shape)).generate(PROMPTS, request, num_rows=2)
        assert [each.token_ids for each in results] == expected


@pytest.mark.parametrize("kind", KINDS)
def test_it_drafts_the_same_in_a_batch_and_alone_also_sampled_trees(lm: Target, kind: str) -> None:
    request = GenerationSettings(max_new_tokens=12, temperature=1.0, seed=5)
    engine = Engine(lm, KINDS[kind](lm), parse_shape("s2.1"))
    together = engine.generate(PROMPTS, request)
    for number, prompt in enumerate(PROMPTS):
        alone = engine.generate([prompt], request, request_ids=[number])[0]
        assert (alone.token_ids, alone.accepted) == (together[number].token_ids, together[number].accepted)


def sure(lm: Target, alpha: float = ALPHA) -> RefinedDrafter:
    """A block drafter with a confidence head, refined by the table."""
    head = BlockDrafter.for_target(lm.ends, num_draft_steps=4, confidence=True)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in head.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
    config = RefinedConfig(head="head", ngrams="table", alpha=alpha, num_candidates=8)
    return RefinedDrafter(config, head.eval(), NgramReviser(kneser_ney(TEXTS, VOCAB, 3))).eval()


@torch.inference_mode()
def test_a_heads_confidence_passes_through_the_refinement(lm: Target) -> None:
    refined, limits = sure(lm).bound(lm.ends), DraftLimits(1, 4)
    start = opening(lm, [[BOS, 5, 9, 11], [BOS, 8, 30, 31]], limits, refined.features)
    own = refined.expander(refined.start(start), first_cycle(start), limits)
    plain = refined.head.expander(refined.head.start(start), first_cycle(start), limits)
    own.begin(), plain.begin()
    for tokens in ([[4], [8]], [[7], [9]], [[9], [1]]):
        chances, expected = own.acceptance(), plain.acceptance()  # type: ignore[attr-defined]
        assert chances is not None
        torch.testing.assert_close(chances, expected)
        for draft in (own, plain):
            draft.extend(torch.tensor(tokens), torch.zeros(2, 1, dtype=torch.int64))


@torch.inference_mode()
def test_confidence_ends_refined_drafts(lm: Target) -> None:
    refined, sizes = sure(lm).bound(lm.ends), []
    for threshold in (0.0, 0.999):
        limits = DraftLimits(2, 4, 7, early_stop=EarlyStop(threshold, step=0.0))
        start = opening(lm, [[BOS, 5, 9, 11], [BOS, 8, 30, 31]], limits, refined.features)
        cycle = replace(first_cycle(start), stop_below_B=torch.full((2,), threshold))
        sizes.append(int(refined.propose(refined.start(start), cycle, limits).valid_BN.sum()))
    assert sizes == [16, 6], "the root alone is always continued"


@pytest.mark.parametrize("shape", ["1x4e0.5s0", "3x4n7e0.5"])
def test_drafts_that_confidence_ends_change_no_token(lm: Target, shape: str) -> None:
    request = GenerationSettings(max_new_tokens=12, temperature=1.0, seed=1)
    plain = [each.token_ids for each in Engine(lm).generate(PROMPTS, request)]
    replies = Engine(lm, sure(lm), parse_shape(shape)).generate(PROMPTS, request)
    assert [reply.token_ids for reply in replies] == plain


def test_sampled_refined_chains_that_confidence_ends_keep_the_targets_law(lm: Target) -> None:
    limits = DraftLimits(sampled=SampledChildren((1, 1, 1)), early_stop=EarlyStop(0.5, step=0.0))
    request = GenerationSettings(max_new_tokens=3, temperature=1.2, top_k=2, seed=11)
    assert chi_square_pvalue(Engine(lm, sure(lm), limits), [BOS, 5, 9], request, num_draws=400) > 1e-3


def by_paths(lm: Target, alpha: float = ALPHA, num_paths: int = 5, family: str = "blockdrafter") -> RefinedDrafter:
    if family == "p-eagle":
        head: Drafter = Eagle3.for_target(lm.ends, num_draft_steps=3, mask_token_id=VOCAB - 1).eval()
    else:
        head = fresh(next(each for each in EVERY_FAMILY if each.name == family), lm.ends)
    config = RefinedConfig(head="head", ngrams="table", alpha=alpha, num_candidates=6, num_paths=num_paths)
    return RefinedDrafter(config, head, NgramReviser(kneser_ney(TEXTS, VOCAB, 3))).eval()


@pytest.mark.parametrize("family", ["blockdrafter", "headsdrafter", "riderdrafter", "p-eagle"])
@pytest.mark.parametrize("shape", ["1x3", "3x3n6", "3x3"])
def test_replies_of_best_paths_stay_the_targets_own(lm: Target, family: str, shape: str) -> None:
    for request in (
        GenerationSettings(max_new_tokens=16),
        GenerationSettings(max_new_tokens=16, temperature=0.9, seed=2),
    ):
        expected = [each.token_ids for each in Engine(lm).generate(PROMPTS, request)]
        drafter = by_paths(lm, family=family)
        results = Engine(lm, drafter, parse_shape(shape)).generate(PROMPTS, request, num_rows=2)
        assert [each.token_ids for each in results] == expected


@torch.inference_mode()
def test_the_best_path_beats_every_path_of_candidates_and_without_weight_it_is_the_heads_own(lm: Target) -> None:
    limits, text = DraftLimits(1, 3), [[BOS, 5, 9, 11]]
    start = opening(lm, text, limits, by_paths(lm).features)
    table = kneser_ney(TEXTS, VOCAB, 3)
    for alpha in (0.0, ALPHA):
        refined = by_paths(lm, alpha).bound(lm.ends)
        chain = refined.propose(refined.start(start), first_cycle(start), limits)
        head = refined.head.expander(refined.head.start(start), first_cycle(start), limits)
        slots = [head.begin()[0, 0].log_softmax(-1)]
        for _ in range(2):
            slots.append(head.extend(torch.tensor([[1]]), torch.tensor([[0]]))[0, 0].log_softmax(-1))

        def score(path: tuple[int, ...], slots: list[Tensor] = slots, alpha: float = alpha) -> float:
            history, total = [9, 11], 0.0
            for slot, token in zip(slots, path, strict=True):
                context = table.context_of(torch.tensor([history]))
                total += float(slot[token]) + alpha * float(table.log_prob(context, torch.tensor([token])))
                history.append(token)
            return total

        candidates = [slot.topk(6).indices.tolist() for slot in slots]
        path = tuple(chain.tokens_BN[0, 1:].tolist())
        assert score(path) == pytest.approx(max(map(score, product(*candidates))), abs=1e-4)
        if alpha == 0.0:
            assert list(path) == [int(slot.argmax()) for slot in slots]


def test_what_best_paths_cannot_do_is_an_error(lm: Target) -> None:
    with pytest.raises(ValueError, match="read the tokens drafted before them"):
        by_paths(lm, family="redrafter")
    config = RefinedConfig(head="head", ngrams="table", num_candidates=65, num_paths=2)
    with pytest.raises(ValueError, match="make 4225 states of a path, more than 4096"):
        RefinedDrafter(config, by_paths(lm).head, NgramReviser(kneser_ney(TEXTS, VOCAB, 3)))
    for shape in ("t2.1", "2x3p0.1", "2x3n4m1"):
        with pytest.raises(ValueError, match="leave num_paths out"):
            Engine(lm, by_paths(lm), parse_shape(shape)).generate(PROMPTS, GenerationSettings())


def test_a_whole_cycle_of_best_paths_is_one_graph(lm: Target) -> None:
    graphs = 0

    def counting(graph: torch.fx.GraphModule, _: list[Tensor]) -> Callable[..., Any]:
        nonlocal graphs
        graphs += 1
        return graph.forward

    torch._dynamo.reset()
    engine = Engine(lm, by_paths(lm), parse_shape("2x3n5"), runner=lambda cycle: CompiledRunner(cycle, counting))
    request = GenerationSettings(max_new_tokens=9)
    expected = [each.token_ids for each in Engine(lm).generate(PROMPTS, request)]
    assert [each.token_ids for each in engine.generate(PROMPTS, request, num_rows=2)] == expected
    assert graphs == 1


def test_a_whole_cycle_with_a_table_is_one_graph(lm: Target) -> None:
    graphs = 0

    def counting(graph: torch.fx.GraphModule, _: list[Tensor]) -> Callable[..., Any]:
        nonlocal graphs
        graphs += 1
        return graph.forward

    torch._dynamo.reset()
    engine = Engine(lm, by_table(lm), parse_shape("2x2n3"), runner=lambda cycle: CompiledRunner(cycle, counting))
    request = GenerationSettings(max_new_tokens=9)
    expected = [each.token_ids for each in Engine(lm).generate(PROMPTS, request)]
    assert [each.token_ids for each in engine.generate(PROMPTS, request, num_rows=2)] == expected
    assert graphs == 1


def test_without_weight_the_head_decides_and_with_much_the_table_does(lm: Target) -> None:
    logits = {}
    for alpha in (0.0, 50.0):
        refined = by_table(lm, alpha, num_candidates=VOCAB).bound(lm.ends)
        limits = DraftLimits(1, 2)
        start = opening(lm, [[BOS, 5, 9, 11]], limits, refined.features)
        with torch.inference_mode():
            logits[alpha] = refined.expander(refined.start(start), first_cycle(start), limits).begin()[0, 0]
            if alpha == 0.0:
                plain = refined.head.expander(refined.head.start(start), first_cycle(start), limits).begin()[0, 0]
    torch.testing.assert_close(logits[0.0], plain.log_softmax(-1))
    assert int(logits[50.0].argmax()) == 4, "the texts go on with 4 behind 9 11"


def write(folder: Path, **fields: object) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps({"model_type": "draftsmith_refined", **fields}))
    return folder


def test_a_folder_names_head_and_table(drafter: Path, tmp_path: Path) -> None:
    table = tmp_path / "table"
    table.mkdir()
    head = load_drafter(drafter)
    kneser_ney([[1, 2, 3]], head.config.vocab_size, 2, tokenizer_fingerprint="other").save(table)
    folder = write(tmp_path / "own", head=str(drafter), ngrams="../table", alpha=0.3)
    refined = load_drafter(folder)
    assert isinstance(refined, RefinedDrafter)
    assert (refined.config.alpha, refined.features) == (0.3, head.features)
    refined.head.config.tokenizer_fingerprint = ""
    with pytest.raises(ValueError, match="made with another tokenizer"):
        refined.check_tokenizer("this one")
    first = drafter_fingerprint(folder)
    kneser_ney([[1, 2, 4]], head.config.vocab_size, 2).save(table)
    assert drafter_fingerprint(folder) != first


@pytest.mark.parametrize(
    ("fields", "fault"),
    [
        ({"ngrams": "x"}, "no head; name the folder"),
        ({"head": "HEAD"}, "name exactly one of the two"),
        ({"head": "HEAD", "ngrams": "x", "lm": "y"}, "name exactly one of the two"),
        ({"head": "HEAD", "ngrams": "x"}, "holds no n-gram table"),
        ({"head": "HEAD", "lm": "HEAD"}, "which is no causal LM"),
        ({"head": "HEAD", "ngrams": "x", "alpha": -1}, "alpha"),
        ({"head": "HEAD", "lm": "y", "num_paths": 2}, "only an n-gram table rescores whole paths"),
        ({"head": "."}, "names it in turn"),
        (
            {"head": "HEAD", "ngrams": "x", "shared_pool": "../pool"},
            r"shared_pool '\.\./pool', which a draftsmith_refined does not read",
        ),
        (
            {"model_type": "draftsmith_suffix", "head": "HEAD", "ngrams": "x"},
            "ngrams 'x', which a draftsmith_suffix does not",
        ),
        ({"model_type": "draftsmith_phrases", "lm": "y"}, "lm 'y', which a draftsmith_phrases .* draftsmith_refined"),
        ({"head": "embedded:suffix", "ngrams": "x"}, "refine its head, and name the refined drafter as the head of"),
    ],
)
def test_a_folder_that_cannot_be_read_says_why(
    drafter: Path, tmp_path: Path, fields: dict[str, object], fault: str
) -> None:
    fields = {name: str(drafter) if value == "HEAD" else value for name, value in fields.items()}
    with pytest.raises(ValueError, match=fault):
        load_drafter(write(tmp_path / "own", **fields))


def test_a_table_of_another_vocabulary_is_an_error(lm: Target) -> None:
    config = RefinedConfig(head="head", ngrams="table")
    refined = RefinedDrafter(config, head_of(lm), NgramReviser(kneser_ney(TEXTS, VOCAB + 1, 2)))
    with pytest.raises(ValueError, match="make the table with this target"):
        refined.attach(lm.ends)
