import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from matplotlib.image import imread
from tiny import EOS

from draftsmith.decode import Engine, GenerationSettings
from draftsmith.decode.constraints import Constraints
from draftsmith.decode.sampling import ReplyOptions
from draftsmith.evaluate.contenders import EngineContender, TransformersContender, generation_config
from draftsmith.evaluate.drafters import parse_entries
from draftsmith.evaluate.evaluate_command import evaluate, load_candidates
from draftsmith.evaluate.measure import Plan
from draftsmith.evaluate.records import Sample
from draftsmith.models.composed.shared_pool import SharedPool
from draftsmith.models.drafters.drafter_folder import drafter_fingerprint, load_drafter
from draftsmith.models.families.redrafter import ReDrafter
from draftsmith.models.files.fingerprint import module_fingerprint
from draftsmith.models.ngrams.kneser_ney import kneser_ney
from draftsmith.models.target.target import Target


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    file = tmp_path / "prompts.jsonl"
    rows = [{"id": f"p{n}", "prompt_ids": [4 + n, 9, 30, 5 + n], "source": "ab"[n % 2]} for n in range(4)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def test_a_report_of_everything_is_written(tmp_path: Path, target: Path, drafter: Path, prompts: Path) -> None:
    evaluate(
        str(target),
        prompts,
        tmp_path / "out",
        drafters=[f"mine={drafter}@1x2,3x2"],
        temperatures=[0.0, 1.0],
        reply=ReplyOptions(max_new_tokens=12),
        plan=Plan(transformers_prompts=2, prompt_lookup=3, ledger_prompts=1),
    )
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert list(report) == ["command", "machine", "versions", "rows"]
    found = [(row["drafter"], row["beam_width"], row["temperature"]) for row in report["rows"]]
    names = [("plain", None), ("transformers prompt lookup 3", None), ("mine", 1), ("mine", 3)]
    assert found == [(*name, temperature) for temperature in (0.0, 1.0) for name in names]
    for row in report["rows"]:
        assert row["target"] == str(target)
        if row["drafter"] in ("plain", "mine"):
            assert row["exact_share"] == 1.0
            assert row["prompts"] == 4
            assert row["stage_seconds"]["verify"] > 0
    assert report["rows"][0]["tokens_per_step"] == 1.0
    assert report["rows"][0]["transformers_exact_share"] == 1.0
    assert report["rows"][2]["drafter_fingerprint"]
    assert imread(tmp_path / "out" / "report.png").shape[0] > 300
    rooflines = {row["drafter"]: row["roofline"] for row in report["rows"]}
    assert rooflines["transformers prompt lookup 3"] is None
    assert rooflines["plain"]["draft_bytes"] == 0
    assert 0 < rooflines["plain"]["bound_seconds"] < rooflines["mine"]["bound_seconds"]
    assert set(rooflines["mine"]["left_over_seconds"]) == {"draft", "verify", "accept", "rest"}
    assert imread(tmp_path / "out" / "roofline.png").shape[0] > 300
    assert "| mine 3x2 | 1 |" in (tmp_path / "out" / "report.md").read_text()
    assert list((tmp_path / "out" / "tensorboard").iterdir())
    record = json.loads((tmp_path / "out" / "provenance.json").read_text())
    assert record["config"]["drafters"][0]["name"] == "mine"
    assert record["inputs"][str(drafter)]


def test_drafters_made_of_others_are_raced_like_any_other(
    tmp_path: Path, target: Path, drafter: Path, prompts: Path
) -> None:
    table, refined, joined, pool, pooled = (
        tmp_path / name for name in ("table", "refined", "joined", "pool", "pooled")
    )
    for folder in (table, refined, joined, pool, pooled):
        folder.mkdir()
    kneser_ney([[1, 2, 3]], load_drafter(drafter).config.vocab_size, 2).save(table)
    SharedPool.of([[1, 2, 3, 4, 5, 6]], load_drafter(drafter).config.vocab_size).save(pool)
    (pooled / "config.json").write_text(json.dumps({"model_type": "draftsmith_suffix", "shared_pool": "../pool"}))
    fields = {"model_type": "draftsmith_refined", "head": str(drafter), "ngrams": "../table", "alpha": 0.3}
    (refined / "config.json").write_text(json.dumps(fields))
    (joined / "config.json").write_text(json.dumps({"model_type": "draftsmith_suffix", "head": str(drafter)}))
    evaluate(
        str(target),
        prompts,
        tmp_path / "out",
        drafters=[
            "suffix=embedded:suffix@1x2",
            f"pooled={pooled}@1x2",
            f"refined={refined}@1x2",
            f"joined={joined}@2x2",
            f"head={drafter}@1x2",
        ],
        reply=ReplyOptions(max_new_tokens=8),
        plan=Plan(transformers_prompts=0, prompt_lookup=0, ledger_prompts=1),
    )
    rows = {row["drafter"]: row for row in json.loads((tmp_path / "out" / "report.json").read_text())["rows"]}
    assert all(row["exact_share"] == 1.0 for row in rows.values())
    read = {name: row["roofline"]["draft_bytes"] for name, row in rows.items()}
    assert read["suffix"] == read["pooled"] == 0
    inputs = json.loads((tmp_path / "out" / "provenance.json").read_text())["inputs"]
    assert inputs[str(pooled)] == drafter_fingerprint(pooled), "which hangs on the pool's tokens"
    assert read["refined"] == read["head"] > 0
    assert read["joined"] > 0


@pytest.mark.parametrize("model_type", ["draftsmith_suffix", "draftsmith_phrases", "draftsmith_refined"])
def test_what_a_drafter_without_weights_drafts_from_is_part_of_its_fingerprint(
    tmp_path: Path, target: Path, drafter: Path, model_type: str
) -> None:
    vocab_size, model = load_drafter(drafter).config.vocab_size, Target.load(str(target))
    folder, named = tmp_path / "mine", tmp_path / "named"
    folder.mkdir()
    named.mkdir()
    refined = {"head": str(drafter), "ngrams": "../named"}
    fields = refined if model_type == "draftsmith_refined" else {"shared_pool": "../named"}
    (folder / "config.json").write_text(json.dumps({"model_type": model_type, **fields}))

    def fingerprints(text: list[int]) -> tuple[str, str]:
        made = SharedPool.of([text], vocab_size) if "ngrams" not in fields else kneser_ney([text], vocab_size, 2)
        made.save(named)
        [mine, weights] = load_candidates(parse_entries([f"a={folder}", f"b={drafter}"], ["1x2"]), model, "")
        return mine.fingerprint, weights.fingerprint

    first, again, other = fingerprints([1, 2, 3]), fingerprints([1, 2, 3]), fingerprints([1, 2, 4])
    assert first == again
    assert first[0] != other[0]
    assert first[1] == other[1] == module_fingerprint(load_drafter(drafter)), "which exports compare with reports"


def test_ragged_batches_give_the_same_replies(tmp_path: Path, target: Path, drafter: Path, prompts: Path) -> None:
    evaluate(
        str(target),
        prompts,
        tmp_path / "out",
        [str(drafter)],
        reply=ReplyOptions(max_new_tokens=10),
        plan=Plan(batch_size=3, transformers_prompts=3),
    )
    rows = json.loads((tmp_path / "out" / "report.json").read_text())["rows"]
    assert [row["exact_share"] for row in rows] == [1.0, 1.0]
    assert rows[0]["transformers_exact_share"] == 1.0
    assert all(part["speedup"] is None for row in rows for part in row["slices"])
    assert all(0.3 < row["busy_rows"] <= 1.0 for row in rows)
    assert "The engine decoded 3 prompts at once" in (tmp_path / "out" / "report.md").read_text()


@pytest.mark.parametrize(
    ("batch_size", "num_prompts", "expected"), [(1, 50, 1), (4, 50, 13), (16, 70, 35), (16, 64, 64), (8, 3, 3)]
)
def test_a_round_has_about_four_prompts_a_row_and_rounds_are_alike(
    batch_size: int, num_prompts: int, expected: int
) -> None:
    assert Plan(batch_size=batch_size).round_prompts(num_prompts) == expected


def test_every_engine_of_a_round_refills_its_rows_and_transformers_takes_batches(target: Path) -> None:
    model = Target.load(str(target))
    settings = GenerationSettings(max_new_tokens=6)
    samples = [Sample(str(number), "all", (1, *range(5, 7 + number))) for number in range(5)]
    alone = EngineContender("plain", Engine(model), settings)
    whole = [alone.decode([sample], [0])[0] for sample in samples]
    rows = EngineContender("plain", Engine(model), settings, num_rows=2).decode(samples, range(5))
    assert [reply.token_ids for reply in rows] == [reply.token_ids for reply in whole]
    assert {reply.cycles_before for reply in rows} > {0}
    batches = TransformersContender("transformers", model, settings, batch_size=2).decode(samples, range(5))
    assert [reply.token_ids for reply in batches] == [reply.token_ids for reply in whole]


def test_a_drafter_of_another_target_is_refused_before_anything_is_decoded(
    tmp_path: Path, other_target: Path, drafter: Path, prompts: Path
) -> None:
    with pytest.raises(ValueError, match="was trained for target"):
        evaluate(str(other_target), prompts, tmp_path / "out", [str(drafter)])
    assert not (tmp_path / "out").exists()


def test_a_drafter_of_another_tokenizer_is_refused(tmp_path: Path, target: Path, drafter: Path, prompts: Path) -> None:
    changed = ReDrafter.from_pretrained(drafter)
    changed.config.tokenizer_fingerprint = "0" * 64
    changed.save_pretrained(tmp_path / "changed")
    with pytest.raises(ValueError, match="was trained with another tokenizer"):
        evaluate(str(target), prompts, tmp_path / "out", [str(tmp_path / "changed")])


@pytest.mark.parametrize(
    ("plan", "message"),
    [
        ({"batch_size": 0}, "batch_size is 0; it must be at least 1"),
        ({"repeats": 0}, "repeats is 0"),
        ({"transformers_prompts": -1}, "transformers_prompts is -1"),
        ({"prompt_lookup": 5, "batch_size": 2}, "needs batch_size 1"),
        ({"prompt_lookup": 5, "transformers_prompts": 0}, "needs batch_size 1 and transformers_prompts above 0"),
    ],
)
def test_plans_that_cannot_be_are_refused(plan: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Plan(**plan)


def test_generate_is_left_no_defaults_of_its_own(target: Path) -> None:
    model = Target.load(str(target))
    greedy = generation_config(GenerationSettings(max_new_tokens=500, eos_token_ids=(EOS,)), model, prompt_length=200)
    assert (greedy.do_sample, greedy.max_new_tokens, greedy.eos_token_id) == (False, 56, [EOS])
    sampled = generation_config(GenerationSettings(temperature=0.7, top_p=0.9), model, prompt_length=4)
    assert (sampled.do_sample, sampled.temperature, sampled.top_k, sampled.top_p) == (True, 0.7, 0, 0.9)


def test_generate_and_the_engine_are_given_the_same_constraints(target: Path) -> None:
    """Those of the settings, whatever the model's own config says; afterwards that config is as it was."""
    model = Target.load(str(target))
    sample, plain = Sample("a", "s", (5, 6, 7, 8, 9)), GenerationSettings(max_new_tokens=8, eos_token_ids=(EOS,))
    free = EngineContender("plain", Engine(model), plain).decode([sample], [0])[0].token_ids
    forbidding = replace(plain, constraints=Constraints(suppress_tokens=free[:3], no_repeat_ngram_size=2))
    model.model.generation_config.suppress_tokens = [free[0]]
    kept = model.model.generation_config
    for settings in (plain, forbidding):
        theirs = TransformersContender("transformers", model, settings).decode([sample], [0])[0].token_ids
        assert theirs == EngineContender("plain", Engine(model), settings).decode([sample], [0])[0].token_ids
    assert theirs != free
    assert model.model.generation_config is kept


@pytest.mark.parametrize("penalty", [1.0, 1e4])
def test_generates_padded_batches_equal_single_prompts(target: Path, penalty: float) -> None:
    """Also where token 0, a usual padding, is likely and penalised once it is in the text."""
    model = Target.load(str(target))
    settings = GenerationSettings(
        max_new_tokens=8,
        repetition_penalty=penalty,
        eos_token_ids=(EOS,),
        constraints=Constraints(sequence_bias=(((0,), 30.0),)),
    )
    contender = TransformersContender("transformers", model, settings)
    samples = [Sample("a", "s", (5, 6, 7, 8, 9)), Sample("b", "s", (20, 21))]
    together = contender.decode(samples, [0, 1])
    assert together == contender.decode(samples[:1], [0]) + contender.decode(samples[1:], [1])


def test_prompt_lookup_emits_the_same_tokens_and_counts_its_steps(target: Path) -> None:
    model = Target.load(str(target))
    settings, sample = GenerationSettings(max_new_tokens=24), Sample("a", "s", tuple([5, 6, 7, 8] * 6))
    plain = TransformersContender("transformers", model, settings).decode([sample], [0])[0]
    lookup = TransformersContender("lookup", model, settings, prompt_lookup=4).decode([sample], [0])[0]
    assert lookup.token_ids == plain.token_ids
    assert lookup.prefill_tokens + sum(count + 1 for count in lookup.accepted) == len(lookup.token_ids)
    assert torch.all(torch.tensor(lookup.accepted) >= 0)
