"""All turns of a conversation are decoded, each on the target's own replies to the turns before."""

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest

from draftsmith.data.progress import ProgressMeter, metered
from draftsmith.data.prompts import ALL_PROMPTS
from draftsmith.data.replies.reply_sources import Reply
from draftsmith.decode import Engine, GenerationSettings
from draftsmith.decode.sampling import ReplyOptions
from draftsmith.evaluate import measure as measuring
from draftsmith.evaluate.evaluate_command import evaluate
from draftsmith.evaluate.measure import Plan, all_turns
from draftsmith.evaluate.resume import WORK_FILE, Part
from draftsmith.evaluate.samples import Questions, selected_questions
from draftsmith.models.files.loading import load_tokenizer
from draftsmith.models.target.options import DEFAULTS
from draftsmith.models.target.prompt_template import OWN_TEMPLATE
from draftsmith.models.target.target import Target

TURNS = [["ab", "cd", "e"], ["fg"], ["hi", "jk"]]
RUN = Plan(transformers_prompts=0, ledger_prompts=0)


@pytest.fixture
def bench(tmp_path: Path) -> Path:
    file = tmp_path / "bench.jsonl"
    rows = [{"question_id": n, "category": "xyx"[n], "turns": turns} for n, turns in enumerate(TURNS)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def questions_of(bench: Path, target: Path, max_turns: int | None = None) -> Questions:
    tokenizer = load_tokenizer(str(target))
    return selected_questions(bench, str(target), tokenizer, ALL_PROMPTS, OWN_TEMPLATE, DEFAULTS, max_turns)


def test_turns_come_one_after_the_other_and_read_the_replies_before(bench: Path, target: Path) -> None:
    questions, asked = questions_of(bench, target), []

    def answer(turns: Sequence[tuple[int, Sequence[int]]]) -> list[Reply]:
        asked.append([number for number, _ in turns])
        return [Reply([40 + number], "length") for number, _ in turns]

    samples = questions.played(answer, None)
    first, other, third = (sample.id for sample in questions.samples)
    assert [sample.id for sample in samples] == [first, other, third, f"{first}/2", f"{third}/2", f"{first}/3"]
    assert [sample.turn for sample in samples] == [1, 1, 1, 2, 2, 3]
    assert [sample.category for sample in samples] == ["x", "y", "x", "x", "x", "x"]
    assert asked == [[0, 2], [3]], "no reply to a last turn is played"
    assert samples[3].prompt_ids[: len(samples[0].prompt_ids) + 1] == (*samples[0].prompt_ids, 40)
    assert samples[5].prompt_ids[: len(samples[3].prompt_ids) + 1] == (*samples[3].prompt_ids, 43)
    assert questions.num_turns == len(samples)


def test_a_conversation_that_fills_the_context_ends(bench: Path, target: Path) -> None:
    questions = questions_of(bench, target)
    full = len(questions.samples[0].prompt_ids) + 1
    samples = questions.played(lambda turns: [Reply([40], "length") for _ in turns], full)
    assert [sample.turn for sample in samples] == [1, 1, 1]


def test_the_meter_of_earlier_turns_reaches_its_total_where_a_conversation_ends_early(
    bench: Path, target: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    questions, part, meters = questions_of(bench, target), Part(), []
    full, played = len(questions.samples[0].prompt_ids) + 1, Questions.played

    @contextmanager
    def watched(title: str, total: int, unit: str, done: int) -> Iterator[ProgressMeter]:
        with metered(title, total, unit, done) as meter:
            meters.append(meter)
            yield meter

    monkeypatch.setattr(measuring, "metered", watched)
    monkeypatch.setattr(Questions, "played", lambda own, answer, context: played(own, answer, full))
    all_turns(Target.load(str(target)), questions, GenerationSettings(max_new_tokens=5), RUN, part)
    (meter,) = meters
    assert meter._total == meter._now == len(part.played) == 2


def test_an_endless_clock_of_the_stages_is_refused_with_the_rule() -> None:
    with pytest.raises(ValueError, match="ledger_seconds is inf; give a finite number of seconds above 0"):
        Plan(ledger_seconds=float("inf"))


def test_max_turns_leaves_later_turns_out(bench: Path, target: Path) -> None:
    assert questions_of(bench, target, 2).num_turns == 5
    assert questions_of(bench, target, 1).conversations == {}
    with pytest.raises(ValueError, match="max_turns is 0; it must be at least 1"):
        Plan(max_turns=0)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_the_played_replies_are_those_that_plain_decoding_gives_in_the_race(
    bench: Path, target: Path, temperature: float
) -> None:
    model, part = Target.load(str(target)), Part()
    settings = GenerationSettings(max_new_tokens=5, temperature=temperature, eos_token_ids=model.eos_token_ids)
    samples = all_turns(model, questions_of(bench, target), settings, RUN, part)
    assert sorted(part.played) == [0, 2, 3]
    for number, reply in part.played.items():
        prompt = list(samples[number].prompt_ids)
        (again,) = Engine(model).generate([prompt], settings, request_ids=[number])
        assert again.token_ids == reply.token_ids


def test_a_report_has_every_turn_and_a_killed_run_plays_none_again(
    tmp_path: Path, bench: Path, target: Path, drafter: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def run() -> list[dict]:
        reply = ReplyOptions(max_new_tokens=6)
        evaluate(
            str(target), bench, tmp_path / "out", [f"mine={drafter}@1x2"], temperatures=[1.0], reply=reply, plan=RUN
        )
        return json.loads((tmp_path / "out" / "report.json").read_text())["rows"]

    with monkeypatch.context() as patched:
        patched.setattr(measuring, "race", lambda *args, **options: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            run()
    work = (tmp_path / "out" / WORK_FILE).read_text()
    assert work.count('"played"') == 3, "one row for each round"
    with monkeypatch.context() as patched:
        patched.setattr(Part, "keep_played", lambda part, replies: pytest.fail("played again"))
        rows = run()
    assert [row["prompts"] for row in rows] == [6, 6]
    assert rows[1]["exact_share"] == 1.0
    assert [(part["category"], part["prompts"]) for part in rows[1]["by_category"]] == [("x", 5), ("y", 1)]
    assert {(part["value"], part["prompts"]) for part in rows[1]["slices"] if part["by"] == "turn"} == {
        ("1", 3),
        ("2", 2),
        ("3", 1),
    }
    assert "## By category" in (tmp_path / "out" / "report.md").read_text()
    assert (tmp_path / "out" / "categories.png").is_file()


def test_the_row_that_the_page_shows_is_read_with_both_turns(tmp_path: Path, target: Path) -> None:
    page = (Path(__file__).parents[2] / "docs" / "how-to" / "measure" / "evaluate.md").read_text()
    (row,) = [line for line in page.splitlines() if line.startswith('{"question_id"')]
    (tmp_path / "spec_bench.jsonl").write_text(row + "\n")
    questions = questions_of(tmp_path / "spec_bench.jsonl", target)
    assert [sample.category for sample in questions.samples] == ["writing"]
    assert questions.num_turns == 2
