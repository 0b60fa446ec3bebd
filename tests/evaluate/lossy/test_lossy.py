"""The comparison of lossy rules: counted tokens against a count by hand, rows against their definitions, the command and its refusals."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from draftsmith.cli import main
from draftsmith.data.prompts import read_prompts
from draftsmith.decode import Engine, GenerationSettings
from draftsmith.decode.verify.lossy_rule import LossyRule
from draftsmith.decode.verify.lossy_rules import Divergence, Everything, JudgeRule, TopK, Typical
from draftsmith.decode.verify.rule_text import parse_rule
from draftsmith.decode.verify.uncertain_rules import Fly
from draftsmith.embedded import write_prompts
from draftsmith.evaluate.lossy import lossy
from draftsmith.evaluate.lossy.chart import draw_trade
from draftsmith.evaluate.lossy.lossy import Ruled, RuleRow, compare
from draftsmith.evaluate.lossy.paired import change_bounds
from draftsmith.evaluate.lossy.price import draw_prices, price_table, prices
from draftsmith.evaluate.lossy.report import trade_table
from draftsmith.evaluate.lossy.wrong_tokens import accepted_tokens
from draftsmith.evaluate.samples import read_samples
from draftsmith.label.token_rows import LabelledRow, write_rows
from draftsmith.models import DraftLimits, Target, load_tokenizer
from draftsmith.models.drafters.draft_lm import LMDrafter, load_draft_lm
from draftsmith.models.judge import Judge, JudgeConfig

PROBLEMS = 6


@pytest.fixture(scope="module")
def target() -> Target:
    return Target.load("embedded:target")


@pytest.fixture(scope="module")
def draft_lm(target: Target) -> LMDrafter:
    drafter = load_draft_lm("embedded:draft_lm")
    drafter.attach(target.ends)
    return drafter


@pytest.fixture(scope="module")
def prompts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("prompts") / "test.jsonl"
    write_prompts(path, "test", PROBLEMS)
    return path


def judge(target: Target, threshold: float = 0.5) -> Judge:
    head = Judge(JudgeConfig(hidden_size=target.ends.hidden_size, threshold=threshold))
    with torch.no_grad():
        head.weight.copy_(torch.randn(head.weight.shape, generator=torch.Generator().manual_seed(4)))
    return head.eval()


def labelled(prompts: Path, num_rows: int = 3) -> list[LabelledRow]:
    """Made-up labels on made-up replies: what matters is that they are counted right."""
    tokenizer = load_tokenizer("embedded:target")
    rows = []
    for number, sample in enumerate(read_samples(prompts, tokenizer)[:num_rows]):
        reply = tokenizer.encode("First, 3 plus 4 is 8 pens.\nThat gives 8.", add_special_tokens=False)
        labels = [(1, 0, -100)[(place + number) % 3] for place in range(len(reply))]
        rows.append(LabelledRow(f"r{number}", f"q{number % 2}", "made", "rule", list(sample.prompt_ids), reply, labels))
    return rows


def floor_of(probs: torch.Tensor) -> float:
    return min(0.2, 0.2**0.5 * math.exp(-float(torch.special.entr(probs).sum())))


def apart(one: torch.Tensor, other: torch.Tensor) -> float:
    return float((one.softmax(-1) * (one.log_softmax(-1) - other.log_softmax(-1))).sum())


@torch.inference_mode()
def by_hand(target: Target, draft_lm: LMDrafter, rule: LossyRule | None, rows: list[LabelledRow]) -> dict[int, float]:
    """Share of tokens that stand, by label, one token at a time."""
    stands: dict[int, list[bool]] = {0: [], 1: []}
    for row in rows:
        ids = torch.tensor([row.prompt_ids + row.reply_ids])
        read = target.prefix(ids)
        logits = target.logits(read.normed)[0]
        drafted = draft_lm.lm.logits(draft_lm.lm.prefix(ids).normed)[0]
        for place, (token, label) in enumerate(zip(row.reply_ids, row.labels, strict=True)):
            at = len(row.prompt_ids) + place
            before = logits[at - 1]
            own = int(before.argmax()) == token
            probs = before.softmax(-1)
            allowed = (
                (isinstance(rule, TopK) and token in before.topk(3).indices)
                or (isinstance(rule, Typical) and float(probs[token]) > floor_of(probs))
                or (isinstance(rule, Divergence) and apart(drafted[at - 1], before) < 0.5)
                or isinstance(rule, Everything)
                or (isinstance(rule, JudgeRule) and bool(rule.judge.accepts(read.pre_norm[0, at])))
            )
            if label in stands:
                stands[label].append(own or allowed)
    return {label: sum(found) / len(found) for label, found in stands.items()}


def test_accepted_shares_are_what_counting_token_by_token_gives(
    target: Target, draft_lm: LMDrafter, prompts: Path
) -> None:
    rows = labelled(prompts)
    rules = [None, TopK(3), Typical(0.2), Divergence(0.5), Everything(), JudgeRule(judge(target))]
    for rule, found in zip(rules, accepted_tokens(target, draft_lm, rules, rows), strict=True):
        wanted = by_hand(target, draft_lm, rule, rows)
        assert found is not None
        assert (found.wrong_share, found.correct_share) == pytest.approx((wanted[0], wanted[1]))
        assert found.wrong_interval[0] <= found.wrong_share <= found.wrong_interval[1]


def test_labels_of_one_class_give_no_shares(target: Target, draft_lm: LMDrafter, prompts: Path) -> None:
    rows = [LabelledRow(**{**vars(row), "labels": [1] * len(row.labels)}) for row in labelled(prompts)]
    with pytest.raises(ValueError, match="0 wrong"):
        accepted_tokens(target, draft_lm, [None], rows)


@pytest.fixture(scope="module")
def compared(target: Target, draft_lm: LMDrafter, prompts: Path) -> dict[str, RuleRow]:
    tokenizer = load_tokenizer("embedded:target")
    samples = read_samples(prompts, tokenizer)
    references = [json.loads(line)["answer"] for line in prompts.read_text().splitlines()]
    rules = [
        Ruled("lossless", None),
        Ruled("judge", JudgeRule(judge(target, 1.0))),
        Ruled("everything", Everything()),
    ]
    rows = compare(
        target,
        draft_lm,
        DraftLimits(draft_length=12),
        rules,
        samples,
        lambda number, text: text.strip().endswith(f"#### {references[number]}"),
        lambda ids: str(tokenizer.decode(list(ids), skip_special_tokens=True)),
        GenerationSettings(160, eos_token_ids=target.eos_token_ids),
        timed_problems=2,
        batch_rows=4,
    )
    return {row.rule: row for row in rows}


def test_a_shut_judge_has_the_row_of_lossless_decoding(compared: dict[str, RuleRow]) -> None:
    lossless, shut = compared["lossless"], compared["judge"]
    assert shut.same_text_share == lossless.same_text_share == 1.0
    assert shut.accepted_per_cycle == lossless.accepted_per_cycle > 0
    assert shut.target_forwards_per_answer == lossless.target_forwards_per_answer
    assert shut.by_rule_share == 0.0
    assert shut.accuracy == compared["plain"].accuracy
    assert (lossless.lossy, shut.lossy) == (False, True)


def test_accepting_everything_saves_the_most_forwards(compared: dict[str, RuleRow]) -> None:
    everything, lossless, plain = compared["everything"], compared["lossless"], compared["plain"]
    assert everything.accepted_per_cycle > 8 > lossless.accepted_per_cycle
    assert (
        everything.target_forwards_per_answer < lossless.target_forwards_per_answer < plain.target_forwards_per_answer
    )
    assert everything.by_rule_share > 0
    assert everything.same_text_share < 1
    assert everything.accuracy_change == pytest.approx(everything.accuracy - plain.accuracy)


def test_the_chart_is_a_png_of_some_size(compared: dict[str, RuleRow]) -> None:
    picture = draw_trade(list(compared.values()))
    assert picture[:8] == b"\x89PNG\r\n\x1a\n"
    assert len(picture) > 20_000


def test_without_timed_problems_there_is_no_speed_and_the_report_says_so(
    prompts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(lossy, "race", lambda *_, **__: pytest.fail("something was timed"))
    words = ["--target", "embedded:target", "--drafter", "embedded:draft_lm", "--prompts", prompts, "--limit", 2]
    words += ["--checker", "final-number", "--shape", "1x4", "--out", tmp_path / "out", "--timed-problems", 0]
    assert main(["judge", "evaluate", *map(str, words), "--rules", "lossless", "top-k@2"]) == 0
    assert capsys.readouterr().out.count("| - |") >= 3
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert [row["speedup"] for row in report["rows"]] == [None, None, None]
    assert "2 problems; no speed was measured." in (tmp_path / "out" / "report.md").read_text()
    assert (tmp_path / "out" / "report.png").stat().st_size > 10_000


def test_a_compiled_race_compiles_every_way_of_decoding_but_not_the_counting(
    target: Target, draft_lm: LMDrafter, prompts: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []

    def noted(*given: Any, compile: str = "auto", **named: Any) -> Engine:
        asked.append(compile)
        return Engine(*given, **named)

    monkeypatch.setattr(lossy, "Engine", noted)
    samples = read_samples(prompts, load_tokenizer("embedded:target"))[:1]
    settings = GenerationSettings(4, eos_token_ids=target.eos_token_ids)
    rules = [Ruled("lossless", None), Ruled("everything", Everything())]
    chain = DraftLimits(draft_length=2)
    compare(target, draft_lm, chain, rules, samples, lambda *_: True, str, settings, timed_problems=1, compile="on")
    assert asked == ["off"] * 3 + ["on"] * 3


def test_at_equal_quality_a_rule_has_the_largest_gain_of_its_settings_that_lose_no_more(
    compared: dict[str, RuleRow],
) -> None:
    base = replace(compared["lossless"], accepted_per_cycle=5.0)
    rule = replace(compared["everything"], rule="kl", threshold=1.0, accepted_per_cycle=6.0, accuracy_change=-0.01)
    rows = [compared["plain"], base, rule]
    rows += [replace(rule, threshold=2.0, accepted_per_cycle=7.5, accuracy_change=-0.004)]
    rows += [replace(rule, threshold=3.0, accepted_per_cycle=9.0, accuracy_change=-0.012)]
    rows += [replace(rule, rule="bold", threshold=2.0, accepted_per_cycle=30.0, accuracy_change=-0.3)]
    kl, bold = prices(rows, 0.01)
    assert (kl.rule, kl.tried, kl.times_lossless) == ("kl", 3, 1.5)
    assert kl.row is not None
    assert kl.row.threshold == 2.0
    assert (bold.rule, bold.row, bold.times_lossless) == ("bold", None, None)
    assert [price.row and price.row.threshold for price in prices(rows, 0.02)] == [3.0, None]
    table = price_table([kl, bold], 0.01).splitlines()
    assert table[-2].startswith("| kl | 3 | 2 | -0.4 (")
    assert "| 7.50 | 1.50 |" in table[-2]
    assert table[-1] == "| bold | 1 | - | every setting loses more | none | none | none |"
    assert draw_prices([kl, bold], rows, 0.01)[:8] == b"\x89PNG\r\n\x1a\n"
    assert prices(rows[:2], 0.01) == []
    assert price_table([], 0.01) == ""


def test_the_bounds_of_a_change_are_wide_where_no_answer_changed(compared: dict[str, RuleRow]) -> None:
    low, high = compared["judge"].accuracy_change_bounds
    assert compared["judge"].accuracy_change_interval == (0.0, 0.0)
    assert (low, high) == change_bounds(0, 0, PROBLEMS)
    assert low < -0.1 < 0.1 < high


def test_the_command_writes_a_report_that_calls_lossy_rules_lossy(
    prompts: Path, tmp_path: Path, target: Target, capsys: pytest.CaptureFixture[str]
) -> None:
    judge(target, 0.9).save_pretrained(tmp_path / "head")
    write_rows(tmp_path / "rows.jsonl", labelled(prompts))
    options = {
        "--target": "embedded:target",
        "--drafter": "embedded:draft_lm",
        "--prompts": prompts,
        "--limit": 3,
        "--checker": "final-number",
        "--shape": "1x8",
        "--out": tmp_path / "out",
        "--timed-problems": 1,
        "--labelled-rows": tmp_path / "rows.jsonl",
    }
    words = [str(word) for pair in options.items() for word in pair]
    rules = ["lossless", f"mine=judge:{tmp_path / 'head'}@0.8", "top-k@2"]
    code = main(["judge", "evaluate", *words, "--rules", *rules])
    assert code == 0
    printed = capsys.readouterr().out
    assert "| mine (lossy) | 0.8 |" in printed
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert [row["rule"] for row in report["rows"]] == ["plain", "lossless", "mine", "top-k"]
    assert [row["lossy"] for row in report["rows"]] == [False, False, True, True]
    for row in report["rows"]:
        for name in ("accuracy", "accepted_per_cycle", "target_forwards_per_answer", "speedup"):
            low, high = row[f"{name}_interval"]
            assert low <= row[name] <= high
    assert all(0 <= row["wrong_accepted_share"] <= 1 for row in report["rows"][1:])
    assert "top-k (lossy)" in (tmp_path / "out" / "report.md").read_text()
    assert (tmp_path / "out" / "report.png").stat().st_size > 10_000
    assert (tmp_path / "out" / "price.png").stat().st_size > 5_000
    assert "## At equal quality" in (tmp_path / "out" / "report.md").read_text()


@pytest.mark.parametrize(
    ("rule", "told"),
    [
        ("judge", "write lossless"),
        ("judge:/nowhere", "does not exist"),
        ("top-k", "write lossless"),
        ("top-k@x", "'x' is no number"),
        ("top-k@0", "whole number from 1"),
        ("top-k@nan", "whole number from 1"),
        ("top-k@inf", "whole number from 1"),
        ("kl@nan", "a divergence is at least 0"),
        ("kl@inf", "a divergence is at least 0"),
        ("typical@nan", "a probability above 0"),
        ("=top-k@2", "empty name"),
        ("top-k:folder@2", "only a judge has a folder"),
        ("lossless@1", "write lossless"),
        ("topk@3", "is not known"),
    ],
)
def test_rules_that_are_none_are_refused(rule: str, told: str) -> None:
    with pytest.raises(ValueError, match=told):
        parse_rule(rule)


def test_rules_are_read_with_names_and_thresholds(tmp_path: Path, target: Target) -> None:
    assert parse_rule("lossless") == ("lossless", None)
    assert parse_rule("wide=top-k@7") == ("wide", TopK(7))
    assert parse_rule("kl@0.5") == ("kl", Divergence(0.5))
    judge(target, 0.75).save_pretrained(tmp_path / "head")
    name, rule = parse_rule(f"judge:{tmp_path / 'head'}")
    assert (name, rule and rule.threshold) == ("judge", 0.75)
    name, rule = parse_rule(f"sure=judge:{tmp_path / 'head'}@0.99")
    assert (name, rule and rule.threshold) == ("sure", 0.99)


def test_a_folder_may_have_an_equals_sign_in_its_name(tmp_path: Path, target: Target) -> None:
    judge(target, 0.75).save_pretrained(tmp_path / "l2=0.1")
    for text, name in ((f"judge:{tmp_path / 'l2=0.1'}", "judge"), (f"weak=judge:{tmp_path / 'l2=0.1'}@0.5", "weak")):
        assert parse_rule(text)[0] == name
        assert isinstance(parse_rule(text)[1], JudgeRule)


@pytest.mark.parametrize("name", ["plain", "lossless"])
def test_a_lossy_rule_under_the_name_of_a_lossless_row_is_refused(
    prompts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    words = ["--target", "embedded:target", "--drafter", "embedded:draft_lm", "--prompts", str(prompts)]
    words += ["--out", str(tmp_path / "out"), "--checker", "final-number", "--rules", f"{name}=top-k@2"]
    assert main(["judge", "evaluate", *words]) == 1
    assert f"a rule is named '{name}'" in capsys.readouterr().err


def test_the_table_says_lossy_by_what_a_rule_is_not_by_its_name(compared: dict[str, RuleRow]) -> None:
    renamed = [replace(compared["lossless"], rule="exact"), replace(compared["everything"], rule="lossless")]
    *_, exact, everything = trade_table(renamed).splitlines()
    assert exact.startswith("| exact |")
    assert everything.startswith("| lossless (lossy) |")


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"prompt_ids": []}, "has no prompt token"),
        ({"prompt_ids": [1, 10**6]}, "holds token id 1000000"),
        ({"prompt_ids": [-1]}, "holds token id -1"),
        ({"prompt_ids": [5] * 10**4}, "tokens, the context of"),
    ],
)
def test_rows_that_the_target_cannot_have_read_are_refused(
    target: Target, draft_lm: LMDrafter, prompts: Path, changes: dict[str, list[int]], told: str
) -> None:
    rows = labelled(prompts, 1)
    with pytest.raises(ValueError, match=told) as refused:
        accepted_tokens(target, draft_lm, [None], [replace(rows[0], **changes)])
    assert "row r0" in str(refused.value)


def test_problems_that_no_answer_can_be_judged_by_are_refused_before_anything_is_decoded(
    prompts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [json.loads(line) for line in prompts.read_text().splitlines()]
    bare = {name: value for name, value in rows[1].items() if name in ("id", "messages", "split", "source")}
    words = ["--target", "embedded:target", "--drafter", "embedded:draft_lm", "--out", str(tmp_path / "out")]
    words += ["--checker", "final-number", "--rules", "everything", "--prompts", str(tmp_path / "test.jsonl")]
    for changed, told in (
        ([rows[0], bare], f"problem {bare['id']}: "),
        ([rows[0], {**rows[1], "id": rows[0]["id"]}], f"test.jsonl:2: id is '{rows[0]['id']}'; another problem"),
    ):
        (tmp_path / "test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in changed))
        assert main(["judge", "evaluate", *words]) == 1
        assert told in capsys.readouterr().err
        assert not (tmp_path / "out").exists()


def test_one_rule_given_twice_is_refused(prompts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = [
        "--target",
        "embedded:target",
        "--drafter",
        "embedded:draft_lm",
        "--prompts",
        str(prompts),
        "--out",
        str(tmp_path / "out"),
    ]
    assert main(["judge", "evaluate", *words, "--checker", "final-number", "--rules", "top-k@2", "top-k@2"]) == 1
    assert "is there twice" in capsys.readouterr().err


def test_problems_keep_their_ids(prompts: Path) -> None:
    samples = read_samples(prompts, load_tokenizer("embedded:target"))
    assert [sample.id for sample in samples] == [prompt.id for prompt in read_prompts(prompts, None)]


def test_a_rule_that_looks_at_the_targets_choices_is_given_them(
    target: Target, draft_lm: LMDrafter, prompts: Path
) -> None:
    lossless, fly = accepted_tokens(target, draft_lm, [None, Fly(0.0, window=1)], labelled(prompts))
    assert lossless is not None
    assert fly is not None
    assert lossless.correct_share <= fly.correct_share < 1.0
