"""A shared pool: only where a user names it, fixed, announced, and no token of any reply depends on it."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from doubles import BOS, VOCAB, draft, greedy_by_hand, random_target
from every_family import EVERY_FAMILY, fresh
from joint_law import chi_square_pvalue
from safetensors.torch import save_file
from torch import Tensor

from draftsmith.decode import Engine, GenerationSettings
from draftsmith.decode.runners import CompiledRunner
from draftsmith.models import DraftLimits, Target
from draftsmith.models.composed.phrase_drafter import PhraseConfig, PhraseDrafter
from draftsmith.models.composed.shared_pool import MOST_SLOTS, SharedPool, load_pool
from draftsmith.models.composed.suffix_drafter import SuffixConfig, SuffixDrafter
from draftsmith.models.drafters.drafter_folder import drafter_fingerprint, load_drafter
from draftsmith.models.tree.shapes import parse_shape

PROMPTS = [[BOS, 5, 9, 11, 4], [BOS, 7], [BOS, 8, 30, 31, 32]]
LONG = GenerationSettings(max_new_tokens=40)
SAMPLED = GenerationSettings(max_new_tokens=24, temperature=0.8, seed=4)
KINDS = ["suffixes", "suffixes with a head", "phrases", "phrases behind a head"]


@pytest.fixture(scope="module")
def lm() -> Target:
    return random_target()


@pytest.fixture(scope="module")
def pool(lm: Target) -> SharedPool:
    """The very replies that will be asked for again, greedy and drawn."""
    texts = [
        prompt + reply.token_ids
        for request in (LONG, SAMPLED)
        for prompt, reply in zip(PROMPTS, Engine(lm).generate(PROMPTS, request), strict=True)
    ]
    return SharedPool.of(texts, VOCAB)


def suffixes(pool: SharedPool | None, **fields: Any) -> SuffixDrafter:
    return SuffixDrafter(SuffixConfig(**fields), None, pool).eval()


def make(kind: str, lm: Target, pool: SharedPool | None) -> SuffixDrafter:
    family = next(family for family in EVERY_FAMILY if family.name == "eagle")
    head = fresh(family, lm.ends) if "head" in kind else None
    if kind.startswith("phrases"):
        return PhraseDrafter(PhraseConfig(phrase_length=3, num_leaves=2, pool_size=16), head, pool).eval()
    return SuffixDrafter(SuffixConfig(), head, pool).eval()


@pytest.mark.parametrize("request_", [LONG, SAMPLED], ids=["greedy", "sampled"])
@pytest.mark.parametrize("kind", KINDS)
def test_replies_stay_the_targets_own_and_come_in_fewer_cycles(
    lm: Target, pool: SharedPool, kind: str, request_: GenerationSettings
) -> None:
    expected = [each.token_ids for each in Engine(lm).generate(PROMPTS, request_)]
    cycles = []
    for given in (None, pool):
        engine = Engine(lm, make(kind, lm, given), parse_shape("4x6n9"))
        results = engine.generate(PROMPTS, request_, num_rows=2)
        assert [each.token_ids for each in results] == expected
        cycles.append(sum(len(each.accepted) for each in results))
    if "behind" not in kind:  # an untrained head rarely gets to its leaves, where its phrases are
        assert cycles[1] < 0.6 * cycles[0], "the pool holds these replies"


@pytest.mark.parametrize("shape", ["1x6", "3x4", "2x4p0.5"])
def test_greedy_replies_are_those_of_plain_decoding_by_hand(lm: Target, pool: SharedPool, shape: str) -> None:
    results = Engine(lm, suffixes(pool), parse_shape(shape)).generate(PROMPTS, LONG)
    assert [each.token_ids for each in results] == [greedy_by_hand(lm, prompt, 40) for prompt in PROMPTS]


@pytest.mark.parametrize("kind", ["suffixes", "phrases"])
def test_drawn_replies_have_the_targets_law_whatever_the_pool_says(lm: Target, kind: str) -> None:
    """The pool holds three of the four continuations that could be drawn first, so drafts are accepted and rejected."""
    prompt, request = PROMPTS[0], GenerationSettings(max_new_tokens=3, temperature=1.2, top_k=2, seed=11)
    with torch.inference_mode():
        first = lm.model(input_ids=torch.tensor([prompt])).logits[0, -1].topk(2).indices.tolist()
        seconds = [
            lm.model(input_ids=torch.tensor([[*prompt, token]])).logits[0, -1].topk(2).indices for token in first
        ]
    texts = [[*prompt, token, int(second)] for token, pair in zip(first, seconds, strict=True) for second in pair]
    engine = Engine(lm, make(kind, lm, SharedPool.of(texts[1:], VOCAB)), parse_shape("3x3n4"))
    assert chi_square_pvalue(engine, prompt, request, num_draws=400) > 1e-3
    accepted = [sum(each.accepted) for each in engine.generate([prompt] * 40, request)]
    assert set(accepted) == {0, 1}


@pytest.mark.parametrize("kind", KINDS)
def test_a_whole_cycle_is_one_graph(lm: Target, pool: SharedPool, kind: str) -> None:
    graphs = 0

    def counting(graph: torch.fx.GraphModule, _: list[Tensor]) -> Callable[..., Any]:
        nonlocal graphs
        graphs += 1
        return graph.forward

    torch._dynamo.reset()
    engine = Engine(
        lm, make(kind, lm, pool), parse_shape("2x5n6"), runner=lambda cycle: CompiledRunner(cycle, counting)
    )
    request = GenerationSettings(max_new_tokens=12, temperature=1.0, seed=3)
    expected = [each.token_ids for each in Engine(lm).generate(PROMPTS, request)]
    assert [each.token_ids for each in engine.generate(PROMPTS, request, num_rows=2)] == expected
    assert graphs == 1


@pytest.mark.parametrize("kind", ["suffixes", "phrases"])
def test_requests_share_nothing_unless_a_pool_is_named(lm: Target, kind: str) -> None:
    """The same prompt again would be drafted for better, if anything of the first reply were kept."""
    engine = Engine(lm, make(kind, lm, None), parse_shape("2x6n8"))
    own = engine.generate([PROMPTS[2]], LONG)[0].accepted
    for prompts, num_rows in (([PROMPTS[2]], 1), ([PROMPTS[2]] * 3, 1), ([PROMPTS[2]] * 3, 2)):
        assert [each.accepted for each in engine.generate(prompts, LONG, num_rows=num_rows)] == [own] * len(prompts)
    assert load_drafter(Path("embedded:suffix")).pool is None  # type: ignore[attr-defined]


def test_decoding_adds_nothing_to_a_pool(lm: Target, pool: SharedPool) -> None:
    drafter, before = suffixes(pool), pool.tokens_T.clone()
    engine = Engine(lm, drafter, parse_shape("2x6n8"))
    other = [[BOS, 50, 9, 3]]
    accepted = [engine.generate(other, LONG)[0].accepted for _ in range(2)]
    assert accepted[0] == accepted[1]
    assert torch.equal(pool.tokens_T, before)


def test_every_row_is_drafted_for_from_the_pool_and_own_text_counts_first(lm: Target) -> None:
    drafter = suffixes(SharedPool.of([[7, 8, 40, 41], [5, 6, 50]], VOCAB), num_places=1, shortest_match=2)
    tree = draft(lm, drafter, [[BOS, 5, 6, 30, 5, 6], [BOS, 9, 9, 30, 7, 8]], DraftLimits(1, 2))
    assert tree.tokens_BN.tolist() == [[6, 30, 5], [8, 40, 41]]
    assert tree.valid_BN.all()


def test_the_newest_tokens_are_kept() -> None:
    pool = SharedPool.of([[1, 2, 3], [], [4, 5]], VOCAB, num_slots=5)
    assert pool.tokens_T.tolist() == [3, -1, 4, 5, -1]
    assert pool.num_tokens == 3


@pytest.mark.parametrize(
    ("texts", "num_slots", "fault"),
    [
        ([[1]], 1, f"from 2 to {MOST_SLOTS}"),
        ([[1]], MOST_SLOTS + 1, f"from 2 to {MOST_SLOTS}"),
        ([], 8, "no token; give replies"),
        ([[3, VOCAB]], 8, f"the token {VOCAB}, which a vocabulary of {VOCAB} does not have"),
        ([[3, -4]], 8, "the token -4"),
    ],
)
def test_texts_that_make_no_pool_are_errors(texts: list[list[int]], num_slots: int, fault: str) -> None:
    with pytest.raises(ValueError, match=fault):
        SharedPool.of(texts, VOCAB, num_slots)


def write(folder: Path, **fields: object) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps({"model_type": "draftsmith_suffix", **fields}))
    return folder


def saved(folder: Path, pool: SharedPool) -> Path:
    folder.mkdir(exist_ok=True)
    pool.save(folder)
    return folder


@pytest.mark.parametrize("model_type", ["draftsmith_suffix", "draftsmith_phrases"])
def test_a_config_names_the_pool_and_loading_warns(
    tmp_path: Path, lm: Target, caplog: pytest.LogCaptureFixture, model_type: str
) -> None:
    place = saved(tmp_path / "pool", SharedPool.of([[1, 2, 3]], VOCAB, tokenizer_fingerprint="abc"))
    folder = write(tmp_path / "own", model_type=model_type, shared_pool="../pool")
    with caplog.at_level(logging.WARNING):
        drafter = load_drafter(folder)
        Engine(lm, drafter, parse_shape("1x4")).generate(PROMPTS, LONG)
    assert isinstance(drafter, SuffixDrafter)
    assert drafter.pool is not None
    assert drafter.pool.tokens_T.tolist() == [1, 2, 3, -1]
    [said] = [record.getMessage() for record in caplog.records if "shared pool" in record.getMessage()]
    assert "'../pool' (3 tokens of earlier replies)" in said
    assert "show one user's text to another" in said
    assert "Replies themselves stay the target's own" in said
    drafter.check_tokenizer("abc")
    with pytest.raises(ValueError, match=r"made with another tokenizer \(abc\).*make it again with this target"):
        drafter.check_tokenizer("other")
    first = drafter_fingerprint(folder)
    saved(place, SharedPool.of([[1, 2, 4]], VOCAB))
    assert drafter_fingerprint(folder) != first
    caplog.clear()
    load_drafter(write(tmp_path / "without", model_type=model_type))
    assert not caplog.records


def test_a_pool_of_another_vocabulary_is_an_error(lm: Target) -> None:
    with pytest.raises(ValueError, match="make the pool with this target"):
        suffixes(SharedPool.of([[1]], VOCAB + 1)).attach(lm.ends)


def test_a_pool_that_is_none_says_why(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="holds no shared pool; give what `draftsmith data pool` wrote"):
        load_drafter(write(tmp_path / "own", shared_pool="../nothing"))
    with pytest.raises(ValueError, match="shared_pool is 3, it must be text"):
        load_drafter(write(tmp_path / "own", shared_pool=3))
    place = saved(tmp_path / "pool", SharedPool.of([[1, 2]], VOCAB))
    weights = place / "model.safetensors"
    good = torch.tensor([1, 2, -1])
    for tensors, fault in (
        ({}, "no line of int64 tokens"),
        ({"tokens": good.int()}, "no line of int64 tokens, but torch.int32"),
        ({"tokens": good[None]}, r"of shape \(1, 3\)"),
        ({"tokens": good[:2]}, "no gap behind its last text"),
        ({"tokens": torch.tensor([-1, -1])}, "no token"),
        ({"tokens": torch.tensor([1, VOCAB, -1])}, f"the token {VOCAB}"),
        ({"tokens": torch.tensor([1, -2, -1])}, "the token -2"),
        ({"tokens": torch.ones(MOST_SLOTS + 1, dtype=torch.int64)}, f"more than {MOST_SLOTS}"),
    ):
        save_file(tensors, weights)
        with pytest.raises(ValueError, match=f"{fault}.*make the pool again"):
            load_pool(place)
    saved(place, SharedPool.of([[1, 2]], VOCAB))
    weights.write_bytes(weights.read_bytes()[:-4])
    with pytest.raises(
        ValueError, match=r"model\.safetensors is cut off or no safetensors file: .*make the pool again"
    ):
        load_pool(place)
    weights.unlink()
    with pytest.raises(ValueError, match=r"model\.safetensors does not exist; make the pool again"):
        load_pool(place)
    for fields in ({}, {"vocab_size": 0}, {"vocab_size": VOCAB, "tokenizer_fingerprint": 4}):
        (place / "config.json").write_text(json.dumps({"model_type": "draftsmith_pool", **fields}))
        with pytest.raises(ValueError, match=r"config\.json.*make the pool again"):
            load_pool(place)
