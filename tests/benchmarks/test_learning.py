"""What little text is worth: the replay from a cache against real decoding, and the runs of the curve."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
from doubles import random_target
from heads import shaken
from tuning import SAMPLES

from benchmarks.drafters.recipes import Trained
from benchmarks.learning import curve, rule_bounds
from benchmarks.learning.replay import Drawn, acceptance, drafts_of, record_cached
from draftsmith.data.cache.extract import extract
from draftsmith.data.shards.shards import CachedSample
from draftsmith.decode import Engine, GenerationSettings
from draftsmith.evaluate.tune.recording import record
from draftsmith.evaluate.tune.simulate import replay
from draftsmith.models import Drafter, DraftLimits, Eagle, ReDrafter, Target
from draftsmith.models.composed.suffix_drafter import SuffixConfig, SuffixDrafter
from draftsmith.models.target.target import PRE_NORM

LIMITS = DraftLimits(3, 4, node_budget=8)
REQUEST = GenerationSettings(max_new_tokens=16)


@pytest.fixture(scope="module")
def model() -> Target:
    return random_target()


def drafter_of(model: Target, kind: str) -> Drafter:
    if kind == "eagle":
        return shaken(Eagle.for_target(model.ends))
    torch.manual_seed(0)
    head = ReDrafter.for_target(model.ends, num_draft_steps=4)
    return SuffixDrafter(SuffixConfig(), head) if kind == "union" else head


def cached(model: Target, lengths: dict[int, int], request: GenerationSettings = REQUEST) -> list[CachedSample]:
    """Replies with their states; `lengths` cuts some of them short."""
    prompts = [list(sample.prompt_ids) for sample in SAMPLES]
    samples = []
    for number, reply in enumerate(Engine(model).generate(prompts, request)):
        ids = torch.tensor([*prompts[number], *reply.token_ids[: lengths.get(number)]])
        states = model.prefix(ids[None], (PRE_NORM,)).feature(PRE_NORM)[0]
        mask = torch.arange(len(ids)) >= len(prompts[number])
        samples.append(CachedSample(str(number), ids, mask, {PRE_NORM: states}, None))
    return samples


@pytest.mark.parametrize("kind", ["eagle", "redrafter"])
@torch.inference_mode()
def test_a_cache_of_greedy_replies_tells_what_real_decoding_accepts(model: Target, kind: str) -> None:
    drafter = drafter_of(model, kind)
    replayed = record_cached(drafter.bound(model.ends), cached(model, {}), LIMITS, batch_size=3)
    real = record(model, drafter, SAMPLES, REQUEST, widths=[LIMITS.beam_width], depth=LIMITS.draft_length)
    for ours, engines in zip(replayed, real, strict=True):
        assert ours.token_ids == engines.token_ids
        assert (ours.ranks[3] == engines.ranks[3]).all()
    assert acceptance(replayed, LIMITS) == acceptance(real, LIMITS)
    assert acceptance(replayed, LIMITS).positions == sum(len(reply.token_ids) - 1 for reply in real)


@torch.inference_mode()
def test_the_bounds_of_rules_are_those_of_the_first_drafted_token(model: Target) -> None:
    samples = cached(model, {1: 5}, GenerationSettings(max_new_tokens=16, temperature=0.7, seed=3))
    drafter = drafter_of(model, "redrafter").bound(model.ends)
    found = rule_bounds.chances(drafter, model.ends, samples, 0.7, batch_size=2)
    for number, (prompt, reply, trees) in enumerate(drafts_of(drafter, samples, DraftLimits(3, 1))):
        p_PV = (model.ends.logits(model.ends.final_norm(samples[number].hidden[PRE_NORM])) / 0.7).softmax(-1)
        drafted = [tree.tokens[tree.parents == 0].tolist() for tree in trees[3]]
        accepted = sum(float(p_PV[len(prompt) + place, tokens].sum()) for place, tokens in enumerate(drafted))
        assert found["walk", 3].emitted[number] == pytest.approx(accepted, rel=1e-4)
        assert found["walk", 3].cycles[number] == len(reply) - 1


def test_no_rule_accepts_more_of_drawn_candidates_than_the_bound() -> None:
    p_PV, q_PV = torch.tensor([[0.5, 0.3, 0.2]]), torch.tensor([[0.2, 0.5, 0.3]])
    assert float(rule_bounds.drawn_chance(p_PV, q_PV, 1)) == pytest.approx(0.7)  # the chain rule's own acceptance
    assert float(rule_bounds.drawn_chance(p_PV, p_PV, 1)) == pytest.approx(1.0)
    assert float(rule_bounds.drawn_chance(p_PV, q_PV, 2)) == pytest.approx(
        0.36 + 0.3 + 0.2
    )  # 1 - 0.8 ** 2, and both others whole
    assert float(rule_bounds.walk_chance(p_PV, q_PV, 2)) == pytest.approx(0.5)


@pytest.mark.parametrize(("temperature", "likeliest"), [(0.0, False), (1.0, False), (1.0, True)])
@pytest.mark.parametrize("kind", ["redrafter", "union"])
@torch.inference_mode()
def test_replies_take_the_cycles_of_the_engine(model: Target, kind: str, temperature: float, likeliest: bool) -> None:
    limits = replace(LIMITS, likeliest=likeliest)
    request = GenerationSettings(max_new_tokens=16, temperature=temperature, seed=3)
    drafter = drafter_of(model, kind)
    drawn = None if temperature == 0.0 else Drawn(request, range(len(SAMPLES)))
    replayed = record_cached(drafter.bound(model.ends), cached(model, {}, request), limits, batch_size=3, drawn=drawn)
    real = Engine(model, drafter, limits).generate([list(sample.prompt_ids) for sample in SAMPLES], request)
    for ours, engines in zip(replayed, real, strict=True):
        assert ours.token_ids == tuple(engines.token_ids)
        assert replay(ours, limits).accepted == tuple(engines.accepted)


@torch.inference_mode()
def test_a_reply_that_ends_early_changes_nothing_of_the_others(model: Target) -> None:
    drafter = drafter_of(model, "eagle").bound(model.ends)
    whole = record_cached(drafter, cached(model, {}), LIMITS, batch_size=8)
    short = record_cached(drafter, cached(model, {1: 3}), LIMITS, batch_size=8)
    assert short[1].num_positions == 2
    for number in range(len(SAMPLES)):
        kept = short[number].num_positions
        assert (short[number].ranks[3][: kept - 2] == whole[number].ranks[3][: kept - 2]).all()


def test_a_sample_of_two_replies_is_refused(model: Target) -> None:
    sample = cached(model, {})[0]
    mask = sample.loss_mask.clone()
    mask[1] = True
    with pytest.raises(ValueError, match="a prompt and one reply"):
        record_cached(
            drafter_of(model, "redrafter"),
            [CachedSample("x", sample.input_ids, mask, dict(sample.hidden), None)],
            LIMITS,
        )


def test_a_cache_without_the_states_that_a_drafter_reads_names_them_and_the_layers_to_extract(model: Target) -> None:
    drafter = drafter_of(model, "eagle").bound(model.ends)
    other = [replace(sample, hidden={"layer.0.output": sample.hidden[PRE_NORM]}) for sample in cached(model, {})]
    with pytest.raises(ValueError, match=r"also reads last\.pre_norm.*--layers layer\.0\.output last\.pre_norm"):
        record_cached(drafter, other, LIMITS)


def write_cache(folder: Path, target: Path, num_replies: int, first: int = 0) -> Path:
    """States of made-up replies of 12 tokens to prompts of two."""
    rows = [
        {"id": str(n), "prompt_ids": [10 + n, 9], "reply_ids": [20 + (first + n + place) % 40 for place in range(12)]}
        for n in range(num_replies)
    ]
    folder.with_suffix(".jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    extract(str(target), folder.with_suffix(".jsonl"), folder)
    return folder


@pytest.fixture
def few_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs of one epoch for a tiny target."""
    own = {"options": {"draft_vocab_size": 64}}
    runs = {
        "e1": curve.Run("one epoch", 1, **own),
        "e1-more": curve.Run("one epoch more", 1, **own, after="e1"),
        "text-e1": curve.Run("text, one epoch", 1, **own, text_epochs=1),
    }
    monkeypatch.setattr(curve, "RUNS", runs)
    monkeypatch.setattr(curve, "TOKENS_PER_BATCH", 64)


def test_every_run_is_made_on_every_corpus_and_cheap_text_comes_before_the_replies(
    tmp_path: Path, target: Path, few_runs: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    small, large = write_cache(tmp_path / "small", target, 8), write_cache(tmp_path / "large", target, 16)
    text, test = write_cache(tmp_path / "text", target, 24, first=7), write_cache(tmp_path / "test", target, 4)
    work = tmp_path / "work"
    words = ["--target", target, "--cache", small, large, "--text", text, "--test", test, "--work", work]
    arguments = [*map(str, words), "--runs", "e1-more", "e1", "text-e1"]
    curve.main(arguments)
    rows = capsys.readouterr().out.splitlines()[-6:]
    cells = [[cell.strip() for cell in row.strip("|").split("|")] for row in rows]
    # 8, 16 and 24 samples of 14 tokens each, in batches of 64 tokens
    assert [row[:4] for row in cells] == [
        ["one epoch more", "96", "0", "4"],
        ["one epoch", "96", "0", "2"],
        ["text, one epoch", "96", "288", "8"],
        ["one epoch more", "192", "0", "8"],
        ["one epoch", "192", "0", "4"],
        ["text, one epoch", "192", "288", "10"],
    ]
    begun = json.loads((work / "large" / "text-e1" / "drafter" / "provenance.json").read_text())
    assert str(work / "large" / "text-e1" / "text" / "drafter") in json.dumps(begun)
    more = json.loads((work / "large" / "e1-more" / "drafter" / "provenance.json").read_text())
    assert str(work / "large" / "e1" / "drafter") in json.dumps(more)
    monkeypatch.setattr(curve, "train", lambda *_, **__: pytest.fail("what is kept is not trained again"))
    curve.main(arguments)
    assert capsys.readouterr().out.splitlines()[-6:] == rows
    with pytest.raises(ValueError, match=r"is of other text than .*large"):
        curve.measured(curve.RUNS["e1"], str(target), large, test, work / "small" / "e1")


def test_a_drafter_of_a_run_that_was_killed_is_not_taken_for_other_text(
    tmp_path: Path, target: Path, few_runs: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    replies, test = write_cache(tmp_path / "replies", target, 4), write_cache(tmp_path / "test", target, 2)
    text, other = write_cache(tmp_path / "text", target, 5, first=7), write_cache(tmp_path / "other", target, 6)
    out, run = tmp_path / "work", curve.RUNS["text-e1"]
    trained: list[Path] = []

    def killed(recipe: object, target: str, cache: Path, out: Path, steps: int) -> Trained:
        trained.append(cache)
        if cache == replies:
            raise KeyboardInterrupt
        (out / "trained.json").write_text(json.dumps(asdict(Trained(1, 1, 1.0))))
        return Trained(1, 1, 1.0)

    monkeypatch.setattr(curve, "train", killed)
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            curve.measured(run, str(target), replies, test, out, text)
    assert trained == [text, replies] * 2
    with pytest.raises(ValueError, match=r"read\.json is of other text than .*other"):
        curve.measured(run, str(target), replies, test, out, other)
    (out / "text" / curve.READ).unlink()
    with pytest.raises(ValueError, match=r"text has a drafter and no read\.json.*delete"):
        curve.measured(run, str(target), replies, test, out, text)


def test_a_run_over_cheap_text_asks_for_it(tmp_path: Path, target: Path, few_runs: None) -> None:
    with pytest.raises(ValueError, match=r"name.*--text"):
        curve.measured(curve.RUNS["text-e1"], str(target), tmp_path, tmp_path, tmp_path)
