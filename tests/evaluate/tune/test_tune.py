"""The search for a draft shape: the replay against the engine, the static tree against brute force, the clock, the command.

Shape legend: B batch rows, M nodes of a layer, V vocabulary.
"""

from __future__ import annotations

import itertools
import json
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from doubles import BOS, VOCAB, draft, random_target
from heads import deep_target
from hypothesis import given, settings
from hypothesis import strategies as st
from matplotlib.image import imread
from tuning import SAMPLES, NoisyOracle, flat_costs

from draftsmith.decode import Engine, GenerationSettings
from draftsmith.decode.sampling import DrawOptions
from draftsmith.evaluate.strata.acceptance import tokens_per_step
from draftsmith.evaluate.tune.costs import Cost, Costs, CycleClock, Probe, TimingPlan, rising, time_cycles
from draftsmith.evaluate.tune.recording import NOWHERE, Drafted, Recorded, Recording, record, trace, unpruned
from draftsmith.evaluate.tune.report import TuneReport, best_of_each, heat_map, tune_json, tune_markdown
from draftsmith.evaluate.tune.simulate import best_static_tree, path_counts, replay
from draftsmith.evaluate.tune.tune import Grid, weigh
from draftsmith.evaluate.tune.tune_command import RowsOptions, TimingOptions, rounds_text, tune, typical_text
from draftsmith.models import Drafter, DraftLimits, Eagle, ReDrafter, Target
from draftsmith.models.families.riders.rider_drafter import RiderFamily
from draftsmith.models.tree.kept_shapes import SHAPES_FILE
from draftsmith.models.tree.shapes import full_tree, parse_shape, shape_text

REQUEST = GenerationSettings(max_new_tokens=24)
MADE_BY = {"command": "draftsmith tune", "machine": {}, "versions": {}}


@pytest.fixture(scope="module")
def model() -> Target:
    return random_target()


@pytest.fixture(scope="module")
def recorded(model: Target) -> list[Recorded]:
    with torch.inference_mode():
        return record(model, NoisyOracle(model), SAMPLES, REQUEST, widths=(1, 2, 4), depth=5, batch_size=3)


def engine_cycles(model: Target, drafter: Drafter, limits: DraftLimits, request: GenerationSettings) -> list[list[int]]:
    prompts = [list(sample.prompt_ids) for sample in SAMPLES]
    return [one.accepted for one in Engine(model, drafter, limits).generate(prompts, request)]


SHAPES = ["1x1", "1x3", "1x5", "2x3n4", "2x5n10", "4x2n3", "4x4n7", "4x5n20", "4x5n1", "4x5n200"]


@pytest.mark.parametrize("shape", SHAPES)
def test_the_replay_takes_the_very_cycles_that_the_engine_takes(
    model: Target, recorded: list[Recorded], shape: str
) -> None:
    limits = parse_shape(shape)
    replayed = [replay(reply, limits) for reply in recorded]
    real = engine_cycles(model, NoisyOracle(model), limits, REQUEST)
    assert [list(one.accepted) for one in replayed] == real
    steps = sum(len(reply.token_ids) - 1 for reply in recorded) / sum(map(len, real))
    assert tokens_per_step(replayed) == pytest.approx(steps)


def test_the_oracle_of_these_tests_is_right_often_but_not_always(recorded: list[Recorded]) -> None:
    steps = [tokens_per_step([replay(reply, parse_shape(shape)) for reply in recorded]) for shape in ("1x1", "4x5n20")]
    assert steps[0] is not None
    assert steps[1] is not None
    assert 1.1 < steps[0] < 1.9 < steps[1] < 5.0


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_replies_that_end_by_themselves_are_cut_as_the_engine_cuts_them(model: Target, temperature: float) -> None:
    ends = tuple(range(3, VOCAB, 12))
    request = GenerationSettings(max_new_tokens=30, temperature=temperature, seed=3, eos_token_ids=ends)
    with torch.inference_mode():
        replies = record(model, NoisyOracle(model), SAMPLES, request, widths=(3,), depth=4, batch_size=4)
    assert any(reply.token_ids[-1] in ends and reply.num_positions > 2 for reply in replies)
    for shape in ("3x4n9", "3x2n4"):
        real = engine_cycles(model, NoisyOracle(model), parse_shape(shape), request)
        assert [list(replay(reply, parse_shape(shape)).accepted) for reply in replies] == real


def test_riders_are_recorded_as_deep_as_the_trees() -> None:
    target = deep_target()
    drafter = RiderFamily(riders="prompt").build(target.ends, None, 6, "").eval()
    [reply] = record(target, drafter, SAMPLES[:1], GenerationSettings(max_new_tokens=5), widths=(2,), depth=6)
    assert reply.ahead[2].shape == (4, 6, 6)


@pytest.mark.parametrize("family", [ReDrafter, Eagle])
def test_drafting_several_trees_a_cycle_disturbs_no_state(model: Target, family: type[Drafter]) -> None:
    """What is recorded behind any token is what a fresh drafter proposes behind the same text."""
    drafter = family.for_target(model.ends).eval()  # type: ignore[attr-defined]
    recording = Recording(drafter, widths=(1, 3), depth=3)
    prompts = [list(sample.prompt_ids) for sample in SAMPLES[:3]]
    replies = Engine(model, recording).generate(prompts, GenerationSettings(max_new_tokens=7))
    for prompt, reply, drafted in zip(prompts, replies, recording.drafted, strict=True):
        assert [len(trees) for trees in drafted.values()] == [6, 6]
        for (width, trees), place in itertools.product(drafted.items(), (0, 1, 5)):
            fresh = draft(model, drafter, [prompt + reply.token_ids[: place + 1]], unpruned(width, 3))
            assert trees[place].tokens.tolist() == fresh.tokens_BN[0].tolist()
            assert trees[place].parents.tolist() == fresh.parents_BN[0].tolist()
            assert fresh.scores_BN is not None
            assert trees[place].scores == pytest.approx(fresh.scores_BN[0].numpy(), abs=1e-3)


@pytest.mark.parametrize("paths", [full_tree((2, 2)), ((0,), (3,), (3, 1)), ((0,), (0, 0), (0, 2), (1,))])
def test_a_static_tree_of_two_levels_is_replayed_as_the_engine_runs_it(
    model: Target, recorded: list[Recorded], paths: tuple[tuple[int, ...], ...]
) -> None:
    limits = DraftLimits(paths=paths)
    real = engine_cycles(model, NoisyOracle(model), limits, REQUEST)
    assert [list(replay(reply, limits).accepted) for reply in recorded] == real


def test_a_deeper_static_tree_is_never_promised_more_than_it_keeps(model: Target, recorded: list[Recorded]) -> None:
    """Below the first layer the record knows only what the widest tree continued."""
    limits = DraftLimits(paths=full_tree((4, 2, 2, 1)))
    real = engine_cycles(model, NoisyOracle(model), limits, REQUEST)
    promised = tokens_per_step([replay(reply, limits) for reply in recorded])
    kept = sum(sum(cycles) + len(cycles) for cycles in real) / sum(map(len, real))
    assert promised is not None
    assert 0.9 * kept < promised <= kept


def test_the_place_of_the_true_token_is_told_for_every_depth() -> None:
    """Root, children 7 (-0.1) and 8 (-1.2), 9 (-0.4) and 8 (-1.2) below 7; the tie goes to the shallower 8."""
    tree = Drafted(
        tokens=np.array([3, 7, 8, 9, 8], dtype=np.int32),
        parents=np.array([-1, 0, 0, 1, 1], dtype=np.int32),
        depths=np.array([0, 1, 1, 2, 2], dtype=np.int32),
        scores=np.array([0.0, -0.1, -1.2, -0.4, -1.2], dtype=np.float32),
    )

    def traced(*continuation: int) -> tuple[list[list[int]], list[int]]:
        ahead, ranks = np.full((2, 2), NOWHERE, dtype=np.int32), np.full(2, -1, dtype=np.int32)
        trace(tree, continuation, ahead, ranks)
        return ahead.tolist(), ranks.tolist()

    assert traced(8) == ([[1, 2], [NOWHERE, NOWHERE]], [1, -1])
    assert traced(7, 9, 5) == ([[0, 0], [NOWHERE, 1]], [0, 0])
    assert traced(7, 8) == ([[0, 0], [NOWHERE, 3]], [0, 1])
    assert traced(9) == ([[NOWHERE, NOWHERE]] * 2, [-1, -1])


def made_up(accepted: list[int], depth: int = 5) -> Recorded:
    """A reply whose chains hold so many tokens of what follows each position."""
    ahead = np.full((len(accepted), depth, depth), NOWHERE, dtype=np.int32)
    ranks = np.full((len(accepted), depth), -1, dtype=np.int32)
    for place, count in enumerate(accepted):
        for step in range(count):
            ahead[place, step, step:] = step
            ranks[place, step] = 0
    return Recorded((1,), tuple(range(len(accepted) + 1)), {1: ahead}, {1: ranks})


def test_the_replay_goes_from_root_to_root() -> None:
    reply = made_up([2, 0, 0, 5, 1])
    assert replay(reply, DraftLimits(1, 5)).accepted == (2, 1)
    assert replay(reply, DraftLimits(1, 1)).accepted == (1, 0, 1)
    assert replay(made_up([]), DraftLimits(1, 2)).accepted == ()


@pytest.mark.parametrize("shape", ["4x3", "s2.1", "1x3e0.5", "1x3p0.1"])
def test_shapes_that_a_record_does_not_tell_are_refused(recorded: list[Recorded], shape: str) -> None:
    with pytest.raises(ValueError, match="cannot be replayed"):
        replay(recorded[0], parse_shape(shape))


# ---- static trees --------------------------------------------------------------------------------------------------


def connected(paths: tuple[tuple[int, ...], ...]) -> bool:
    return all(len(path) == 1 or path[:-1] in paths for path in paths)


@settings(max_examples=30, deadline=None)
@given(
    st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=3).map(tuple), min_size=1, max_size=12), st.integers(1, 4)
)
def test_the_greedy_static_tree_is_the_best_of_all_trees_of_its_size(ways: list[tuple[int, ...]], size: int) -> None:
    counts = Counter(way[:end] for way in ways for end in range(1, len(way) + 1))
    tree = best_static_tree(counts, size)
    size = min(size, len(counts))
    DraftLimits(paths=tree)  # refuses what hangs in the air
    assert len(tree) == size
    best = max(
        sum(counts[path] for path in chosen)
        for chosen in itertools.combinations(sorted(counts), size)
        if connected(chosen)
    )
    assert sum(counts[path] for path in tree) == best


def test_paths_are_counted_at_every_position(recorded: list[Recorded]) -> None:
    counts = path_counts(recorded)
    positions = sum(reply.num_positions for reply in recorded)
    right = sum(int((reply.ranks[4][:, 0] == 0).sum()) for reply in recorded)
    assert counts[(0,)] == right
    assert 0 < right < positions
    assert all(counts[path] <= counts[path[:-1]] for path in counts if len(path) > 1)
    with pytest.raises(ValueError, match="is the drafter trained"):
        best_static_tree(path_counts([made_up([0, 0])]), 4)


# ---- costs ---------------------------------------------------------------------------------------------------------


def test_series_are_made_to_rise() -> None:
    assert rising([3, 5, 4, 6, 2]) == [3, 4.25, 4.25, 4.25, 4.25]
    assert rising([]) == []


@settings(max_examples=50, deadline=None)
@given(st.lists(st.floats(0.001, 10.0), min_size=1, max_size=12))
def test_a_rising_series_never_falls_and_keeps_its_sum(values: list[float]) -> None:
    risen = rising(values)
    assert all(one <= other + 1e-12 for one, other in itertools.pairwise(risen))
    assert sum(risen) == pytest.approx(sum(values))
    assert risen == (pytest.approx(values) if values == sorted(values) else risen)


def test_a_clock_keeps_every_cycle_apart(model: Target) -> None:
    clock = CycleClock()
    engine = Engine(model, NoisyOracle(model), DraftLimits(2, 3, 4), ledger=clock)
    [reply] = engine.generate([[BOS, 5]], GenerationSettings(max_new_tokens=12))
    assert len(clock.cycle_costs) == len(reply.accepted) > 1
    assert sum(one.draft for one in clock.cycle_costs) == pytest.approx(clock.seconds["draft"])
    rest = sum(seconds for name, seconds in clock.seconds.items() if name not in ("draft", "prefill"))
    assert sum(one.check for one in clock.cycle_costs) == pytest.approx(rest)
    assert min(one.cycle for one in clock.cycle_costs) > 0


def test_a_plan_runs_each_part_once() -> None:
    tree = DraftLimits(paths=((0,), (1,)))
    plan = TimingPlan.of([*map(parse_shape, ("1x2", "1x3", "2x3n4", "2x3n8", "4x3n8")), tree])
    assert plan.whole == (parse_shape("1x2"), parse_shape("1x3"), tree)
    assert {size: shape_text(limits) for size, limits in plan.draft.items()} == {(2, 3): "2x3n8", (4, 3): "4x3n8"}
    assert {nodes: shape_text(limits) for nodes, limits in plan.check.items()} == {4: "4x3n4", 8: "4x3n8"}
    assert len(plan.shapes) == 7
    assert plan.num_runs(Probe((1,), rounds=3)) == 32
    assert TimingPlan.of([parse_shape("1x2")]).check == {}


def test_every_shape_of_a_plan_is_timed(model: Target) -> None:
    grid = Grid((1, 2), (1, 3), (2, 4))
    plan, probe = TimingPlan.of(grid.shapes()), Probe((BOS, 5, 9), batch_size=2, new_tokens=6, rounds=2)
    runs: list[int] = []
    costs = time_cycles(model, ReDrafter.for_target(model.ends), plan, probe, runs.append)
    assert sum(runs) == plan.num_runs(probe)
    assert costs.plain > 0
    assert all(costs.of(limits).draft > 0 and costs.of(limits).check > 0 for limits in grid.shapes())
    assert list(costs.check) == [2, 4]
    assert costs.check[2] <= costs.check[4]
    assert 0.2 * costs.plain < costs.follow < 5 * costs.plain


def test_no_round_begins_that_would_end_after_the_time_and_one_is_timed_all_the_same(model: Target) -> None:
    plan = TimingPlan.of([parse_shape("1x1"), parse_shape("1x2")])
    probe = Probe((BOS, 5), new_tokens=4, rounds=50, most_seconds=1e-6)
    done: list[int] = []
    left: list[int] = []
    costs = time_cycles(model, ReDrafter.for_target(model.ends), plan, probe, done.append, left.append)
    assert costs.rounds == 1
    assert costs.plain > 0
    assert sum(done) == 2 * 4, "an untimed run and a timed one of plain steps, two chains and no draft"
    assert sum(done) + sum(left) == plan.num_runs(probe)


def test_checking_is_interpolated_and_what_was_not_timed_is_refused() -> None:
    chain = parse_shape("1x2")
    costs = Costs(0.1, 0.0, {chain: Cost(0.01, 0.1)}, {(4, 3): 0.02}, {4: 0.1, 8: 0.2})
    assert costs.of(chain).cycle == pytest.approx(0.11)
    assert costs.of(parse_shape("4x3n7")).check == pytest.approx(0.175)
    with pytest.raises(ValueError, match="was not timed"):
        costs.of(parse_shape("4x4n8"))


def test_with_riders_a_shallower_tree_checks_fewer_rows() -> None:
    sizes = {(4, 2): 0.02, (4, 5): 0.05}
    alike = Costs(0.1, 0.0, {}, sizes, {5: 0.1, 11: 0.2})
    riding = replace(alike, rider_depth=5)
    assert [costs.of(parse_shape("4x5n11")).check for costs in (alike, riding)] == pytest.approx([0.2, 0.2])
    assert [costs.of(parse_shape("4x2n11")).check for costs in (alike, riding)] == pytest.approx([0.2, 0.1])


def test_the_depth_of_the_timed_riders_is_kept() -> None:
    target, plan = deep_target(), TimingPlan.of(Grid((1, 2), (1, 3), (2, 4)).shapes())
    probe = Probe((BOS, 5, 9), new_tokens=4, rounds=1)
    drafter = RiderFamily().build(target.ends, None, 3, "").eval()
    assert time_cycles(target, drafter, plan, probe).rider_depth == 3
    assert time_cycles(target, ReDrafter.for_target(target.ends), plan, probe).rider_depth == 0


# ---- weighing and reporting ----------------------------------------------------------------------------------------


def test_a_grid_holds_every_budget_that_a_tree_has_candidates_for() -> None:
    grid = Grid((1, 2, 4), (1, 3), (4, 8, 16))
    assert [shape_text(limits) for limits in grid.shapes()] == [
        "1x1", "1x3", "2x1n2", "2x3n4", "2x3n8", "4x1n4", "4x3n4", "4x3n8", "4x3n16",
    ]  # fmt: skip
    assert grid.depth == 3


@pytest.mark.parametrize("values", [(), (2, 2), (0,), (3, -1)])
def test_a_grid_of_nothing_is_refused(values: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="give numbers of at least 1, each once"):
        Grid((1,), values, (4,))


def test_outcomes_are_weighed_by_tokens_against_seconds(recorded: list[Recorded]) -> None:
    grid = Grid((1, 2, 4), (1, 3, 5), (4, 8))
    dynamic, static = grid.shapes(), grid.static_shapes(recorded)
    outcomes = weigh(recorded, dynamic, static, flat_costs([*dynamic, *static]))
    assert [one.speedup for one in outcomes] == sorted((one.speedup for one in outcomes), reverse=True)
    by_shape = {one.shape: one for one in outcomes}
    assert set(by_shape) == {shape_text(limits) for limits in [*dynamic, *static]}
    one = by_shape["4x3n8"]
    assert (one.manner, one.width, one.depth, one.nodes) == ("dynamic", 4, 3, 8)
    assert one.tokens_per_step == tokens_per_step([replay(reply, parse_shape("4x3n8")) for reply in recorded])
    assert one.speedup == pytest.approx(one.tokens_per_step / 1.3)
    assert one.interval[0] <= one.tokens_per_step <= one.interval[1]
    assert (by_shape["1x5"].manner, by_shape["1x5"].nodes) == ("chain", 5)


def test_static_trees_are_judged_on_prompts_that_they_were_not_chosen_on() -> None:
    """Rank 1 is right in one half of the replies, rank 0 in the other: a tree of one node is wrong wherever it was not chosen."""
    halves = [made_up([1, 1, 1, 1]), made_up([1, 1, 1, 1])]
    halves[1].ranks[1][:, 0] = 1
    limits = DraftLimits(paths=best_static_tree(path_counts(halves), 1))
    [outcome] = weigh(halves, [], [limits], flat_costs([limits]))
    assert outcome.tokens_per_step == 1.0
    assert tokens_per_step([replay(reply, limits) for reply in halves]) > 1.0  # type: ignore[operator]


def test_replies_too_short_to_draft_for_are_refused() -> None:
    with pytest.raises(ValueError, match="no reply has a second token"):
        weigh([made_up([])], [DraftLimits(1, 2)], [], flat_costs([DraftLimits(1, 2)]))
    assert Grid((1,), (2,), (4,)).static_shapes([made_up([])]) == []


def test_the_timed_text_is_a_typical_one_that_leaves_room() -> None:
    replies = [Recorded((9,) * size, tuple(range(10)), {}, {}) for size in (3, 50, 7)]
    assert typical_text(replies, None) == (9,) * 7 + (0, 1, 2, 3, 4)
    assert len(typical_text(replies, 40)) == 8
    assert len(typical_text(replies, 20)) == 1


def reported(recorded: list[Recorded], wobble: float = 0.0) -> TuneReport:
    grid = Grid((1, 2, 4), (1, 3), (4, 8))
    dynamic, static = grid.shapes(), grid.static_shapes(recorded)
    costs = flat_costs([*dynamic, *static])
    costs = Costs(costs.plain, wobble, costs.whole, costs.draft, costs.check)
    outcomes = weigh(recorded, dynamic, static, costs)
    return TuneReport("t", "d", {"prompts": 4}, outcomes, costs, {shape_text(static[0]): "out/static-4.json"})


def test_the_page_names_the_fastest_shape_and_says_when_the_clock_wobbles(recorded: list[Recorded]) -> None:
    report = reported(recorded)
    page = tune_markdown(report, MADE_BY)
    assert f"**Fastest: `{report.word(report.best)}`**" in page
    assert "tree:out/static-4.json" in page
    assert "Wobbly clock" not in page
    assert "lie 40 % of their median apart" in tune_markdown(reported(recorded, wobble=0.4), MADE_BY)
    kinds = [(one.manner, one.width) for one in best_of_each(report.outcomes)]
    assert sorted(kinds) == [("chain", 1), ("dynamic", 2), ("dynamic", 4), ("static", 0)]


def test_json_holds_every_shape_and_the_heat_map_is_a_picture(recorded: list[Recorded], tmp_path: Path) -> None:
    report = reported(recorded)
    found = json.loads(tune_json(report, MADE_BY))
    assert [one["shape"] for one in found["shapes"]] == [one.shape for one in report.outcomes]
    assert found["best"] == report.word(report.best)
    (tmp_path / "map.png").write_bytes(heat_map(report.outcomes))
    image = imread(tmp_path / "map.png")
    assert image.shape[0] > 300
    assert image[..., :3].std() > 0.05
    assert heat_map([one for one in report.outcomes if one.manner == "chain"])[:4] == b"\x89PNG"


# ---- the command ---------------------------------------------------------------------------------------------------


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    file = tmp_path / "prompts.jsonl"
    rows = [{"id": f"p{n}", "prompt_ids": [4 + n, 9, 30, 5 + n], "source": "s"} for n in range(4)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def test_timed_runs_are_told_by_rows_where_they_differ() -> None:
    assert rounds_text({1: 5, 16: 5}) == 5
    assert rounds_text({16: 2, 1: 5}) == "5 with 1 row; 2 with 16 rows"


def test_the_command_writes_all_that_it_promises(
    tmp_path: Path, target: Path, drafter: Path, prompts: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    tune(
        str(target),
        f"mine={drafter}",
        prompts,
        out,
        widths=[1, 8],
        depths=[1, 2],
        nodes=[3, 6],
        draw=DrawOptions(max_new_tokens=16),
        timing=TimingOptions(rounds=1, record_batch=3),
        load=RowsOptions(rows=(1,), keep=False),
    )
    found = json.loads((out / "tune.json").read_text())
    shapes = [one["shape"] for one in found["shapes"] if one["manner"] != "static"]
    assert sorted(shapes) == ["1x1", "1x2", "8x1n3", "8x1n6", "8x2n3", "8x2n6"]
    for one in found["shapes"]:
        assert shape_text(parse_shape(one["word"])) == one["shape"]
        assert one["tokens_per_step"] >= 1.0
    assert found["drafter"] == "mine"
    assert found["setting"]["prompts"] == 4
    assert found["setting"]["timed runs of each shape"] == 1
    assert f"fastest: --shapes {found['best']}" in capsys.readouterr().out
    assert imread(out / "tune.png").shape[0] > 300
    assert "![Predicted speed-up" in (out / "tune.md").read_text()
    assert json.loads((out / "provenance.json").read_text())["inputs"][str(drafter)]
    assert not (drafter / SHAPES_FILE).exists()


def test_the_command_refuses_shapes_and_numbers_that_make_no_sense(
    tmp_path: Path, target: Path, drafter: Path, prompts: Path
) -> None:
    with pytest.raises(ValueError, match="names shapes, which tune is to find"):
        tune(str(target), f"{drafter}@1x4", prompts, tmp_path / "out")
    with pytest.raises(ValueError, match="rounds is 0"):
        tune(str(target), str(drafter), prompts, tmp_path / "out", timing=TimingOptions(rounds=0))
    with pytest.raises(ValueError, match="the draft vocabulary has"):
        tune(str(target), str(drafter), prompts, tmp_path / "out", widths=[4000], depths=[2])
