"""The weight of a second opinion is found by the tokens per step that the engine would take with it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from doubles import VOCAB, random_target
from every_family import EVERY_FAMILY, fresh
from tuning import SAMPLES

from draftsmith.decode import Engine, GenerationSettings
from draftsmith.decode.sampling import DrawOptions
from draftsmith.evaluate.strata.acceptance import tokens_per_step
from draftsmith.evaluate.strata.decoded import Decoded
from draftsmith.evaluate.tune.alphas import AlphaOutcome, alpha_table, best_alpha, weigh_alphas
from draftsmith.evaluate.tune.tune_command import RefinementOptions, RowsOptions, TimingOptions, VocabularyOptions, tune
from draftsmith.models import Target
from draftsmith.models.composed.refined_drafter import RefinedConfig, RefinedDrafter
from draftsmith.models.composed.revisers import NgramReviser
from draftsmith.models.composed.shared_pool import SharedPool
from draftsmith.models.drafters.drafter_folder import load_drafter
from draftsmith.models.ngrams.kneser_ney import kneser_ney
from draftsmith.models.tree.shapes import parse_shape

REQUEST = GenerationSettings(max_new_tokens=24)


@pytest.fixture(scope="module")
def model() -> Target:
    return random_target()


@pytest.fixture(scope="module")
def refined(model: Target) -> RefinedDrafter:
    """A head of random weights, and a table that has read the very replies."""
    prompts = [list(sample.prompt_ids) for sample in SAMPLES]
    texts = [
        prompt + reply.token_ids
        for prompt, reply in zip(prompts, Engine(model).generate(prompts, REQUEST), strict=True)
    ]
    config = RefinedConfig(head="head", ngrams="table", alpha=0.0, num_candidates=VOCAB)
    head = fresh(next(family for family in EVERY_FAMILY if family.name == "redrafter"), model.ends)
    drafter = RefinedDrafter(config, head, NgramReviser(kneser_ney(texts, VOCAB, 4))).eval().bound(model.ends)
    assert isinstance(drafter, RefinedDrafter)
    return drafter


@pytest.mark.parametrize("shape", ["1x3", "2x3n4"])
@torch.inference_mode()
def test_each_weight_gets_the_tokens_per_step_of_the_engine(model: Target, refined: RefinedDrafter, shape: str) -> None:
    limits = parse_shape(shape)
    tried = weigh_alphas(model, refined, SAMPLES, REQUEST, limits, (0.5, 50.0), widest=2)
    assert sorted(outcome.alpha for outcome in tried) == [0.0, 0.5, 50.0]
    for outcome in tried:
        engine = Engine(model, refined.with_alpha(outcome.alpha), limits)
        replies = engine.generate([list(sample.prompt_ids) for sample in SAMPLES], REQUEST)
        decoded = [Decoded(tuple(reply.token_ids), tuple(reply.accepted)) for reply in replies]
        assert outcome.tokens_per_step == pytest.approx(tokens_per_step(decoded))
        assert outcome.is_own == (outcome.alpha == 0.0)
    assert tried[0].alpha == 50.0
    assert tried[0].tokens_per_step > 1.2 * next(each for each in tried if each.is_own).tokens_per_step


def test_another_weight_leaves_the_drafter_as_it_was(refined: RefinedDrafter) -> None:
    other = refined.with_alpha(0.5)
    assert (other.config.alpha, refined.config.alpha) == (0.5, 0.0)
    assert other.head is refined.head
    with pytest.raises(ValueError, match="alpha"):
        refined.with_alpha(-1.0)


def test_words_say_what_to_write_and_the_table_compares_with_the_control() -> None:
    tried = [
        AlphaOutcome(0.5, "1x3", 2.2, (2.0, 2.4), False),
        AlphaOutcome(0.2, "1x3", 2.1, (1.9, 2.3), True),
        AlphaOutcome(0.0, "1x3", 2.0, (1.8, 2.2), False),
    ]
    assert "write 0.5 into" in best_alpha(tried)
    assert "| 0.2 (its own) | 2.10 (1.90 to 2.30) | +5.0 % |" in alpha_table(tried)
    assert "its own alpha 0.2 gives the most" in best_alpha(tried[1:])


def test_the_command_tries_weights_of_a_refined_drafter_only(target: Path, drafter: Path, tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.jsonl"
    rows = [{"id": f"p{n}", "prompt_ids": [4 + n, 9, 30, 5 + n], "source": "s"} for n in range(3)]
    prompts.write_text("".join(json.dumps(row) + "\n" for row in rows))
    table, own = tmp_path / "table", tmp_path / "own"
    table.mkdir()
    own.mkdir()
    kneser_ney([[1, 2, 3]], load_drafter(drafter).config.vocab_size, 2).save(table)
    fields = {"model_type": "draftsmith_refined", "head": str(drafter), "ngrams": "../table", "alpha": 0.3}
    (own / "config.json").write_text(json.dumps(fields))
    pool, pooled = tmp_path / "pool", tmp_path / "suffix and pool"
    pool.mkdir()
    pooled.mkdir()
    SharedPool.of([[1, 2, 3]], load_drafter(drafter).config.vocab_size).save(pool)
    (pooled / "config.json").write_text(json.dumps({"model_type": "draftsmith_suffix", "shared_pool": "../pool"}))
    names = {"head": drafter, "refined": own, "suffix": "embedded:suffix", "pooled": pooled}
    for name, word in names.items():
        tune(
            str(target),
            str(word),
            prompts,
            tmp_path / name,
            widths=[1],
            depths=[2],
            nodes=[2],
            draw=DrawOptions(max_new_tokens=8),
            timing=TimingOptions(rounds=1, prompt_lookup=0),
            load=RowsOptions(rows=(1,), keep=False),
            vocabulary=VocabularyOptions(vocabularies=()),
            refinement=RefinementOptions(alphas=(0.0, 1.0)),
        )
    alphas = {name: json.loads((tmp_path / name / "tune.json").read_text())["alphas"] for name in names}
    assert alphas["head"] == alphas["suffix"] == alphas["pooled"] == []
    assert sorted(each["alpha"] for each in alphas["refined"]) == [0.0, 0.3, 1.0]
    assert "The weight of the second opinion" in (tmp_path / "refined" / "tune.md").read_text()


def test_weights_below_zero_are_an_error() -> None:
    with pytest.raises(ValueError, match="a weight is at least 0"):
        RefinementOptions(alphas=(0.1, -0.2))
