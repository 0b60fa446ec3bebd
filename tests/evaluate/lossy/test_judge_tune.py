"""A judge tuned by answers: the bound of a paired change, which setting is kept, and the command from a judge to a judge with a card."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest
import torch

from draftsmith.cli import main
from draftsmith.decode.verify.lossy_rules import JudgeRule
from draftsmith.embedded import write_prompts
from draftsmith.evaluate.lossy.lossy import Answered
from draftsmith.evaluate.lossy.paired import change_bounds, problems_needed
from draftsmith.evaluate.lossy.sweep import Sweep, parts
from draftsmith.evaluate.lossy.trial import Setting, Trial, best_trial, settings_of_sweep, why_none
from draftsmith.evaluate.lossy.tune_command import SweepOptions, _kept_shapes, agreement, line_end_ids
from draftsmith.models import Target, TargetEnds, load_tokenizer
from draftsmith.models.drafters.drafter_folder import drafter_fingerprint, drafter_folder, load_drafter
from draftsmith.models.files.fingerprint import module_fingerprint
from draftsmith.models.judge import WITH_OPINION, Judge, JudgeConfig, JudgedDrafter, load_judge
from draftsmith.models.lora.lora_adapter import AdapterBond, LoraSettings, add_adapter, save_adapter
from draftsmith.models.tree.shapes import parse_shape

TARGET, DRAFTER = "embedded:target", "embedded:draft_lm"


def trial(gained: int, lost: int, problems: int = 500, accepted: int = 20, stopped: bool = False) -> Trial:
    return Trial(
        Setting("1x16", 0.5),
        problems,
        problems - lost,
        gained,
        lost,
        accepted * 100,
        100,
        lossless_per_cycle=5.0,
        stopped=stopped,
    )


def test_the_bounds_of_a_change_that_nothing_disturbs_narrow_with_the_problems() -> None:
    for problems in (50, 500):
        z = 1.6448536269514722
        low, high = change_bounds(0, 0, problems)
        assert -low == high == pytest.approx(z * z / (problems + z * z), abs=1e-9)


@pytest.mark.parametrize(("gained", "lost"), [(0, 3), (2, 5), (9, 1)])
def test_at_each_bound_the_counts_are_as_unlikely_as_five_in_a_hundred(gained: int, lost: int) -> None:
    problems = 200
    low, high = change_bounds(gained, lost, problems)
    assert -1.0 < low < (gained - lost) / problems < high < 1.0
    for bound, sign in ((low, 1), (high, -1)):
        # The share of lost answers that makes the counts likeliest, by search: the probabilities are (share + bound, share, the rest).
        shares = torch.linspace(max(0.0, -bound), (1.0 - bound) / 2, 200_001, dtype=torch.float64)[1:-1]
        likely = gained * (shares + bound).log() + lost * shares.log()
        likely += (problems - gained - lost) * (1 - 2 * shares - bound).log()
        share = float(shares[likely.argmax()])
        deviation = (problems * (2 * share + bound - bound * bound)) ** 0.5
        assert (gained - lost - problems * bound) / deviation == pytest.approx(sign * 1.64485, abs=1e-3)


def test_so_many_problems_are_needed_as_the_bound_says() -> None:
    needed = problems_needed(0.01)
    assert change_bounds(0, 0, needed)[0] > -0.01 >= change_bounds(0, 0, needed - 1)[0]


def test_the_largest_gain_among_the_settings_that_hold_is_kept() -> None:
    safe, good, bold = trial(0, 0, accepted=10), trial(0, 1, accepted=12), trial(0, 12, accepted=30)
    assert best_trial([safe, good, bold], 0.01) is good
    assert best_trial([bold, trial(0, 0, accepted=4)], 0.01) is None
    assert best_trial([trial(0, 0, stopped=True)], 0.01) is None


def test_of_shapes_that_were_timed_the_fastest_is_kept_not_the_one_that_accepts_most() -> None:
    long, short, untimed = trial(0, 0, accepted=20), trial(0, 0, accepted=12), trial(0, 0, accepted=30)
    long.seconds_per_token, short.seconds_per_token = 0.004, 0.003
    assert best_trial([long, short, untimed], 0.01) is short
    short.lost = 40  # it does not hold
    assert best_trial([long, short, untimed], 0.01) is long


class Made(Sweep):
    """A sweep of 500 problems over made-up answers: by threshold, how many draft tokens a cycle accepts, and every how manieth is lost."""

    made: ClassVar[dict[float, tuple[int, int]]] = {
        0.1: (20, 10),
        0.5: (15, 400),
        0.9: (12, 0),
        0.97: (9, 0),
        0.99: (5, 0),
    }

    def _check(self, settings: object) -> None:
        pass

    def _answer_losslessly(self, shapes: Sequence[str], advance: object) -> Any:
        for shape in shapes:
            self._lossless[shape] = answered(500, 5, 0)

    def _answer(self, setting: Setting, part: range, is_right: object, advance: object) -> Answered:
        accepted, lost = self.made[setting.threshold]
        return answered(len(part), accepted, lost)


def answered(problems: int, accepted: int, lost: int) -> Answered:
    replies: list[Any] = [SimpleNamespace(accepted=[accepted] * 2)] * problems
    return Answered(replies, [not lost or number % lost > 0 for number in range(problems)])


def test_a_setting_stops_where_it_loses_more_gains_nothing_or_gains_less_than_another_that_holds() -> None:
    contest: Any = SimpleNamespace(samples=[None] * 500)
    sweep = Made(contest, Judge(JudgeConfig(4)), (), 0.03, 5, 32, agreement)
    trials = sweep.run([Setting("1x16", threshold) for threshold in (0.99, 0.97, 0.5, 0.9, 0.1)])
    by_threshold = {trial.setting.threshold: trial for trial in trials}
    assert [trial.setting.threshold for trial in trials] == [0.99, 0.97, 0.5, 0.9, 0.1]
    assert (by_threshold[0.1].why_stopped, by_threshold[0.1].problems) == ("loses more", 100)
    assert (by_threshold[0.99].why_stopped, by_threshold[0.99].problems) == ("gains nothing", 100)
    kept = best_trial(trials, 0.03)
    assert kept is by_threshold[0.5]
    assert (kept.problems, kept.stopped) == (500, False)
    for threshold in (0.9, 0.97):
        beaten = by_threshold[threshold]
        assert (beaten.why_stopped, beaten.problems) == ("1x16 at 0.5 holds and gains more", 100)


def test_why_no_setting_is_kept_is_a_sentence() -> None:
    assert why_none([trial(0, 0, problems=50)], 0.01, 268) == (
        "50 problems cannot show a loss below 1 points; even if no answer changes, 268 are needed"
    )
    assert "the nearest, 1x16 at 0.5, changes them by -2.4 points" in why_none([trial(0, 12)], 0.01, 268)
    assert "accepts more than lossless" in why_none([trial(0, 0, accepted=4)], 0.01, 268)


def test_settings_that_were_all_stopped_early_are_not_called_too_few_problems() -> None:
    stopped = [trial(0, 40, problems=100, stopped=True)]
    assert best_trial(stopped, 0.01) is None
    assert why_none(stopped, 0.01, 268).startswith("1 of 1 settings may lose 1 points of right answers or more")


def test_settings_that_gain_nothing_are_not_said_to_lose() -> None:
    idle = trial(0, 0, accepted=4, problems=100)
    idle.stop("gains nothing")
    assert "accepts more than lossless" in why_none([idle], 0.01, 268)
    losing = trial(0, 40, problems=100, stopped=True)
    sentence = why_none([idle, losing, idle], 0.01, 268)
    assert sentence.startswith("1 of 3 settings may lose 1 points of right answers or more")
    assert f"changes them by {100 * losing.change:+.1f} points" in sentence
    assert sentence.endswith("the others accept no more than lossless verification")


def test_where_lossless_decoding_is_never_right_no_setting_is_kept() -> None:
    wrong = Trial(Setting("1x16", 0.3), 500, 0, 0, 0, 2000, 100, lossless_per_cycle=5.0)
    assert wrong.holds(0.01)
    assert best_trial([wrong], 0.01) is None
    assert "answers none of the problems rightly" in why_none([wrong], 0.01, 268)


def test_what_a_judge_cannot_verify_is_an_error_before_anything_is_decoded(
    judge: Path, prompts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("draftsmith.evaluate.lossy.sweep.answer_all", lambda *args: pytest.fail("it has decoded"))
    words = ["--gates", '["line"]', "--shapes", '["1x8", "3x4"]']
    assert tune(judge, prompts, tmp_path / "tuned", *words) == 1
    assert "draft a chain such as 1x64" in capsys.readouterr().err
    head = load_judge(judge)
    head.config.tokenizer_fingerprint = "0" * 64
    head.save_pretrained(tmp_path / "other")
    assert tune(tmp_path / "other", prompts, tmp_path / "tuned") == 1
    assert "trained with another tokenizer" in capsys.readouterr().err


def test_a_part_of_the_problems_draws_the_noise_that_all_of_them_would(monkeypatch: pytest.MonkeyPatch) -> None:
    ids: list[int] = []

    class Recording:
        def stream(self, prompts: list[tuple[int, list[int]]], *rest: object) -> Iterator[tuple[int, object]]:
            ids.extend(number for number, _ in prompts)
            return iter([(index, SimpleNamespace(token_ids=[1])) for index in range(len(prompts))])

    monkeypatch.setattr("draftsmith.evaluate.lossy.sweep.Engine", lambda *args, **fields: Recording())
    samples = [SimpleNamespace(prompt_ids=[1] * length) for length in (1, 2, 3, 4, 5)]
    contest: Any = SimpleNamespace(
        target=None, drafter=None, samples=samples, settings=SimpleNamespace(max_new_tokens=3), text_of=str
    )
    sweep = Sweep(contest, Judge(JudgeConfig(4)), (), 0.01, 5, 32, agreement)
    asked: list[int] = []
    is_right = lambda number, text: not asked.append(number)  # noqa: E731
    meter: Any = SimpleNamespace(advance=lambda count: None)
    sweep._answer(Setting("1x4", 0.5), range(3, 5), is_right, meter)
    assert sorted(ids) == sorted(asked) == [3, 4]


@pytest.mark.parametrize("facts", [{"holds": True, "shape": "t2.1"}, {"holds": False}])
def test_a_judge_knows_a_static_tree_that_it_was_tuned_for(facts: dict[str, object]) -> None:
    head = Judge(JudgeConfig(4, threshold=0.5))
    head.config.drafters = [{"name": "runs/eagle", "fingerprint": "0", "shapes": _kept_shapes(facts, ["t2.1"])}]
    assert JudgeRule(head).unknown_draft("runs/eagle", "0", parse_shape("t2.1")) == ""
    assert "not of 1x4" in JudgeRule(head).unknown_draft("runs/eagle", "0", parse_shape("1x4"))


def test_parts_cover_all_problems_once() -> None:
    assert [list(part) for part in parts(7, 3)] == [[0, 1], [2, 3], [4, 5, 6]]
    assert [list(part) for part in parts(2, 5)] == [[0], [1]]


def test_every_combination_is_tried_and_a_gate_also_with_a_veto() -> None:
    options = SweepOptions(thresholds=(0.5,), gates=("none", "reply"), veto=True)
    found = settings_of_sweep(["1x16", "1x64"], options.thresholds, options.vetoes)
    assert len(found) == len(set(found)) == 6
    assert str(found[2]) == "1x16 at 0.5, reply gate with a veto"


@pytest.mark.parametrize(
    ("fields", "told"),
    [
        ({"thresholds": (1.0,)}, "below 1, which accepts nothing"),
        ({"thresholds": (0.5, 0.5)}, "each once"),
        ({"gates": ()}, "give at least one"),
        ({"veto": True}, "a veto needs a gate"),
        ({"most_lost": 0.0}, "most_lost is 0.0"),
        ({"looks": 0}, "looks is 0"),
    ],
)
def test_settings_out_of_range_are_an_error(fields: dict[str, object], told: str) -> None:
    with pytest.raises(ValueError, match=told):
        SweepOptions(**fields)  # type: ignore[arg-type]


def test_without_a_checker_answers_agree_where_their_last_numbers_do() -> None:
    agrees = agreement(["So 7 and 5 are 12.\n#### 12", "no number"])
    assert agrees(0, "7 + 5 = 12")
    assert not agrees(0, "7 + 5 = 13")
    assert agrees(1, "no number")
    assert not agrees(1, "another text")


def test_the_tokens_that_end_a_line_are_those_with_a_line_feed() -> None:
    tokenizer = load_tokenizer(TARGET)
    ids = line_end_ids(tokenizer)
    assert tokenizer.encode("First.\nThen", add_special_tokens=False)[-2] in ids or len(ids) > 0
    assert all("\n" in tokenizer.decode([token]) for token in ids)


@pytest.fixture(scope="module")
def prompts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("prompts") / "train.jsonl"
    write_prompts(path, "train", 6)
    return path


@pytest.fixture(scope="module")
def judge(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Finds nothing wrong with any token, whatever the threshold below 1."""
    target = Target.load(TARGET)
    head = Judge(JudgeConfig(target.ends.hidden_size, WITH_OPINION, target_name=TARGET))
    with torch.no_grad():
        head.bias.fill_(20.0)
    folder = tmp_path_factory.mktemp("judges") / "yes"
    head.save_pretrained(folder)
    return folder


def tune(judge: Path, prompts: Path, out: Path, *words: object) -> int:
    fixed = ["--target", TARGET, "--drafter", DRAFTER, "--judge", judge, "--prompts", prompts, "--out", out]
    few = ["--thresholds", "[0.5]", "--max_new_tokens", 100, "--looks", 2]
    return main(["judge", "tune", *map(str, [*fixed, *few, *words])])


def test_too_few_problems_shut_the_judge_and_its_card_says_why(
    judge: Path, prompts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert tune(judge, prompts, tmp_path / "tuned", "--checker", "final-number", "--shapes", '["1x8"]') == 0
    assert "6 problems are too few" in capsys.readouterr().out
    tuned = load_judge(tmp_path / "tuned" / "judge")
    assert tuned.config.threshold == 1.0
    assert not tuned.config.labels["tuned"]["holds"]
    assert [drafter["name"] for drafter in tuned.config.drafters] == [DRAFTER]
    assert main(["judge", "export", "--judge", str(tmp_path / "tuned" / "judge"), "--out", str(tmp_path / "card")]) == 0
    card = (tmp_path / "card" / "README.md").read_text()
    assert "**No setting was kept**, so the threshold is 1" in card
    assert "6 problems cannot show a loss below 1 points" in card
    assert "Quality is unmeasured" not in card


def test_a_setting_that_holds_is_kept_with_its_gate_and_decodes(
    judge: Path, prompts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, words = tmp_path / "tuned", ["--most_lost", 99, "--gates", '["none", "line"]', "--shapes", '["1x12"]']
    assert tune(judge, prompts, out, *words) == 0
    assert "Quality is unmeasured" in capsys.readouterr().out
    report = json.loads((out / "tuning.json").read_text())
    free, gated = report["trials"]
    assert (free["setting"]["gate"], gated["setting"]["gate"]) == ("none", "line")
    assert free["per_cycle"] > free["lossless_per_cycle"] > 0
    assert free["per_cycle"] > gated["per_cycle"]
    assert (free["problems"], free["stopped"]) == (6, False)
    assert (gated["problems"], gated["why_stopped"]) == (3, "1x12 at 0.5 holds and gains more")
    assert free["times_plain"] > 0
    assert free["seconds_per_token"] > 0
    assert gated["seconds_per_token"] is None
    tuned = load_judge(out / "judge")
    kept = tuned.config.labels["tuned"]
    assert (kept["holds"], kept["gate"], kept["accepted_per_cycle"]) == (True, "none", free["per_cycle"])
    assert (tuned.config.threshold, tuned.config.drafters[0]["shapes"]) == (0.5, ["1x12"])
    assert "| 1x12 at 0.5, line gate |" in (out / "tuning.md").read_text()
    assert main(["judge", "export", "--judge", str(out / "judge"), "--out", str(tmp_path / "card")]) == 0
    assert "**Quality is unmeasured:**" in (tmp_path / "card" / "README.md").read_text()


def test_the_shape_that_is_kept_took_the_fewest_seconds_a_token(judge: Path, prompts: Path, tmp_path: Path) -> None:
    words = ["--most_lost", 99, "--shapes", '["1x2", "1x12"]', "--timed_problems", 2]
    assert tune(judge, prompts, tmp_path / "tuned", *words) == 0
    report = json.loads((tmp_path / "tuned" / "tuning.json").read_text())
    seconds = {trial["setting"]["shape"]: trial["seconds_per_token"] for trial in report["trials"]}
    assert seconds.keys() == {"1x2", "1x12"}
    assert report["kept"]["shape"] == min(seconds, key=seconds.__getitem__)
    assert report["kept"]["seconds_per_token"] == min(seconds.values())


def test_decode_warns_of_drafts_that_the_judge_has_not_seen(
    judge: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    def warned(**fields: object) -> str:
        head = load_judge(judge).with_threshold(0.5)
        for name, value in fields.items():
            setattr(head.config, name, value)
        head.save_pretrained(tmp_path / "judge")
        words = ["--prompt", "Tom has 3 pens.", "--target", TARGET, "--drafter", DRAFTER, "--max_new_tokens", "4"]
        assert main(["decode", *words, "--shape", "1x4", "--rule", f"judge:{tmp_path / 'judge'}"]) == 0
        return " ".join(capfd.readouterr().err.split())

    own = drafter_fingerprint(drafter_folder(DRAFTER))
    assert "nobody recorded whose drafts this judge has seen" in warned()
    assert "this judge" not in warned(threshold=1.0)  # it accepts nothing
    other = [{"name": "runs/eagle", "fingerprint": "0" * 64, "shapes": ["1x4"]}]
    assert warned(drafters=other).count("has seen drafts of runs/eagle, not of embedded:draft_lm") == 1
    assert "not of 1x4" in warned(drafters=[{"name": DRAFTER, "fingerprint": own, "shapes": ["1x16"]}])
    assert "this judge" not in warned(drafters=[{"name": DRAFTER, "fingerprint": own, "shapes": ["1x4"]}])


def test_decode_warns_of_an_adapter_whose_drafts_the_judge_has_not_seen(
    target: Path, drafter: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """The drafter below it is known, but drafts otherwise with the adapter."""
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    adapted, own = load_drafter(drafter), module_fingerprint(load_drafter(drafter))
    add_adapter(adapted, LoraSettings(rank=2), "a")
    save_adapter(adapted, adapter, "a", AdapterBond.of(adapted, str(drafter), own))
    size = TargetEnds.load(str(target)).hidden_size

    def warned(seen: Path, *names: object) -> str:
        # Another name each time: Python shows a warning of the same words once.
        fingerprint = drafter_fingerprint(drafter_folder(str(seen)))
        known = JudgedDrafter(name=f"known-{len(names)}-{seen.name}", fingerprint=fingerprint, shapes=["1x2"])
        Judge(JudgeConfig(hidden_size=size, threshold=0.5, drafters=[known])).save_pretrained(tmp_path / "judge")
        words = ["--prompt", "Tom has 3 pens.", "--target", target, "--max_new_tokens", 4, "--shape", "1x2"]
        words += ["--rule", f"judge:{tmp_path / 'judge'}", "--drafter_adapter", adapter, *names]
        assert main(["decode", *map(str, words)]) == 0
        return " ".join(capfd.readouterr().err.split())

    for names in ((), ("--drafter", drafter)):
        assert f"drafts of known-{len(names)}-{drafter.name}, not of" in warned(drafter, *names)
        assert "this judge" not in warned(adapter, *names)
