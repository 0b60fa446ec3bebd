"""Several adapters on one drafter: every request is drafted for by its own, and no token of any reply changes."""

from __future__ import annotations

import re
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from doubles import BOS, greedy_by_hand, random_target
from heads import deep_target
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from draftsmith.decode import Engine, GenerationSettings
from draftsmith.decode.adapter_engine import AdapterEngine, AdapterSwitch
from draftsmith.models import Drafter, DraftLimits, Eagle, Eagle3, EarlyStop, ReDrafter, SampledChildren, Target
from draftsmith.models.drafters.draft_records import DraftState
from draftsmith.models.drafters.drafter_folder import load_drafter
from draftsmith.models.families.riders.rider_drafter import RiderFamily
from draftsmith.models.files.fingerprint import module_fingerprint
from draftsmith.models.lora.adapted_drafter import adapted
from draftsmith.models.lora.lora_adapter import AdapterBond, LoraSettings, add_adapter, save_adapter
from draftsmith.models.tree.tree import DraftTree, in_batch_order, tree_from_paths

PROMPTS = [[BOS, 5, 9, 11, 4], [BOS, 7], [BOS, 8, 8, 8, 30, 31, 32, 33], [BOS, 40, 41], [BOS, 50, 9, 3], [BOS, 22]]
NAMES = ["sums", None, "tales", "sums", "tales", None]
MANNERS = {
    "beams": DraftLimits(6, 3),
    "dynamic": DraftLimits(5, 4, node_budget=14),
    "static": DraftLimits(paths=((0,), (1,), (2,), (3,), (0, 0), (0, 2), (1, 0), (0, 0, 0))),
    "stopped": DraftLimits(5, 4, node_budget=12, early_stop=EarlyStop(0.3)),
}
FAMILIES = ("redrafter", "eagle", "eagle3")


@pytest.fixture(scope="module")
def target() -> Target:
    made = random_target()
    made.ends.fingerprint = "f" * 64
    return made


def make(family: str, target: Target) -> Drafter:
    torch.manual_seed(2)
    if family == "redrafter":
        return ReDrafter.for_target(target.ends, draft_token_ids=torch.arange(60), head_init="random")
    if family == "eagle":
        return Eagle.for_target(target.ends)
    return Eagle3.for_target(target.ends)


def save_base(family: str, target: Target, folder: Path) -> Path:
    make(family, target).save_pretrained(folder)
    return folder


def save_shaken(
    base: Path, folder: Path, seed: int, settings: LoraSettings, target_fingerprint: str = "f" * 64
) -> Path:
    """An adapter of random weights."""
    drafter = load_drafter(base)
    fingerprint = module_fingerprint(drafter)
    add_adapter(drafter, settings, "a")
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in drafter.named_parameters():
            if ".lora_" in name:
                parameter.copy_(0.25 * torch.randn(parameter.shape, generator=generator))
    drafter.config.score_scale = 1.0 + seed
    drafter.config.target_fingerprint = target_fingerprint
    folder.mkdir()
    save_adapter(drafter, folder, "a", AdapterBond.of(drafter, str(base), fingerprint))
    return folder


@pytest.fixture(scope="module", params=FAMILIES)
def base(request: pytest.FixtureRequest, target: Target, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_base(request.param, target, tmp_path_factory.mktemp("base") / "drafter")


@pytest.fixture(scope="module")
def folders(base: Path) -> dict[str, Path]:
    """Two adapters of different ranks on different layers."""
    one = "midlayer.self_attn.q_proj" if "3" in load_drafter(base).config.model_type else None
    chosen = None if one is None else [one, "lm_head", "fc"]
    return {
        "sums": save_shaken(base, base.parent / "sums", 1, LoraSettings(rank=2)),
        "tales": save_shaken(base, base.parent / "tales", 2, LoraSettings(rank=3, alpha=5.0, target_modules=chosen)),
    }


def alone(base: Path, folders: dict[str, Path], name: str | None) -> Drafter:
    """The drafter with one adapter merged into it."""
    drafter = load_drafter(base)
    return drafter if name is None else adapted(drafter, folders[name])


@pytest.mark.parametrize("limits", MANNERS.values(), ids=MANNERS)
def test_every_request_is_drafted_for_by_its_own_adapter_and_decoded_exactly(
    target: Target, base: Path, folders: dict[str, Path], limits: DraftLimits
) -> None:
    request = GenerationSettings(max_new_tokens=20)
    engine = AdapterEngine(target, load_drafter(base), folders, limits)
    found = engine.generate(PROMPTS, request, NAMES)
    assert [one.token_ids for one in found] == [greedy_by_hand(target, prompt, 20) for prompt in PROMPTS]
    accepted = {}
    for name in (None, "sums", "tales"):
        whole = Engine(target, alone(base, folders, name), limits).generate(PROMPTS, request)
        accepted[name] = [one.accepted for one in whole]
    assert [one.accepted for one in found] == [accepted[name][row] for row, name in enumerate(NAMES)]
    assert sum(map(sum, (one.accepted for one in found))) > 0
    assert accepted["sums"] != accepted[None] != accepted["tales"] != accepted["sums"], "the adapters draft alike"
    swapped = engine.generate(PROMPTS, request, NAMES[::-1])
    assert [one.accepted for one in swapped] == [accepted[name][row] for row, name in enumerate(NAMES[::-1])]


def test_rows_that_end_early_leave_the_other_groups_undisturbed(
    target: Target, base: Path, folders: dict[str, Path]
) -> None:
    replies = [greedy_by_hand(target, prompt, 24) for prompt in PROMPTS]
    ends = (replies[0][3], replies[2][9], replies[5][1])
    request = GenerationSettings(max_new_tokens=24, eos_token_ids=ends)
    plain = Engine(target).generate(PROMPTS, request)
    assert len({len(one.token_ids) for one in plain}) > 2
    found = AdapterEngine(target, load_drafter(base), folders, MANNERS["beams"]).generate(PROMPTS, request, NAMES)
    assert [one.token_ids for one in found] == [one.token_ids for one in plain]
    for row, name in enumerate(NAMES):
        [single] = Engine(target, alone(base, folders, name), MANNERS["beams"]).generate([PROMPTS[row]], request)
        assert found[row].accepted == single.accepted


@pytest.mark.parametrize("num_rows", [1, 2, 3])
def test_the_adapter_of_a_row_is_that_of_the_request_that_takes_it(
    target: Target, base: Path, folders: dict[str, Path], num_rows: int
) -> None:
    """Prompts wait for rows, and the longest is read in chunks while other adapters act."""
    prompts = [*PROMPTS, [BOS, *range(20, 41)], [BOS, 5]]
    names = [*NAMES, "tales", "sums"]
    budgets = [3, 9, 6, 4, 2, 9, 7, 5]
    request, limits = GenerationSettings(max_new_tokens=9), MANNERS["dynamic"]
    whole = {name: Engine(target, alone(base, folders, name), limits) for name in set(names)}
    expected = [
        whole[name].generate([prompt], replace(request, max_new_tokens=budget))[0]
        for name, prompt, budget in zip(names, prompts, budgets, strict=True)
    ]
    engine = AdapterEngine(target, load_drafter(base), folders, limits, prefill_chunk=4)
    replies = list(
        engine.stream(
            zip(range(8), prompts, names, strict=True),
            request,
            num_rows,
            room=31,
            in_order=True,
            until=lambda index, reply: len(reply) == budgets[index],
        )
    )
    assert [(index, reply.token_ids, reply.accepted) for index, reply in replies] == [
        (index, reply.token_ids, reply.accepted) for index, reply in enumerate(expected)
    ]


def test_an_unknown_adapter_ends_a_stream_behind_the_replies_before_it(engine: AdapterEngine) -> None:
    replies: list[int] = []
    stream = engine.stream(
        [(0, PROMPTS[0], "sums"), (1, PROMPTS[1], None), (2, PROMPTS[2], "tales")],
        GenerationSettings(max_new_tokens=4),
        num_rows=1,
        room=20,
    )
    with pytest.raises(ValueError, match="adapter 'tales' is unknown; there are sums"):
        replies.extend(index for index, _ in stream)
    assert replies == [0, 1]


def test_sampled_text_is_that_of_plain_decoding_and_sampled_trees_that_of_each_adapter_alone(
    target: Target, base: Path, folders: dict[str, Path]
) -> None:
    request = GenerationSettings(max_new_tokens=16, temperature=1.0, seed=5)
    plain = [one.token_ids for one in Engine(target).generate(PROMPTS, request)]
    engine = AdapterEngine(target, load_drafter(base), folders, MANNERS["dynamic"])
    assert [one.token_ids for one in engine.generate(PROMPTS, request, NAMES)] == plain
    limits = DraftLimits(sampled=SampledChildren((3, 2)))
    found = AdapterEngine(target, load_drafter(base), folders, limits).generate(PROMPTS, request, NAMES)
    for row, name in enumerate(NAMES):
        engine_alone = Engine(target, alone(base, folders, name), limits)
        [single] = engine_alone.generate([PROMPTS[row]], request, request_ids=[row])
        assert (found[row].token_ids, found[row].accepted) == (single.token_ids, single.accepted)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_every_request_has_its_own_adapter_on_cuda(base: Path, folders: dict[str, Path]) -> None:
    target = Target.from_model(random_target().model.cuda())
    target.ends.fingerprint = "f" * 64
    request = GenerationSettings(max_new_tokens=20)
    plain = [one.token_ids for one in Engine(target).generate(PROMPTS, request)]
    below = load_drafter(base)
    torch.nn.Module.to(below, target.device)
    engine = AdapterEngine(target, below, folders, MANNERS["dynamic"])
    assert [one.token_ids for one in engine.generate(PROMPTS, request, NAMES)] == plain
    assert engine.generate(PROMPTS, request, NAMES[::-1])[0].token_ids == plain[0]


@pytest.fixture
def engine(target: Target, tmp_path: Path) -> AdapterEngine:
    base = save_base("redrafter", target, tmp_path / "base")
    folder = save_shaken(base, tmp_path / "sums", 1, LoraSettings(rank=2))
    return AdapterEngine(target, load_drafter(base), {"sums": folder})


def test_names_that_are_unknown_or_too_few_are_refused(engine: AdapterEngine) -> None:
    request = GenerationSettings(max_new_tokens=4)
    with pytest.raises(ValueError, match="adapter 'tales' is unknown; there are sums"):
        engine.generate(PROMPTS[:2], request, ["sums", "tales"])
    with pytest.raises(ValueError, match="2 prompts and 1 adapters are given"):
        engine.generate(PROMPTS[:2], request, ["sums"])
    assert engine.generate([], request, []) == []


@pytest.mark.parametrize("name", ["v1.2", "pop", "type", ""])
def test_a_request_may_call_its_adapter_by_any_name(target: Target, tmp_path: Path, name: str) -> None:
    base = save_base("redrafter", target, tmp_path / "base")
    folder = save_shaken(base, tmp_path / "shaken", 1, LoraSettings(rank=2))
    engine = AdapterEngine(target, load_drafter(base), {name: folder, "other": folder})
    request = GenerationSettings(max_new_tokens=8)
    found = engine.generate(PROMPTS[:3], request, [name, None, "other"])
    assert [one.token_ids for one in found] == [greedy_by_hand(target, prompt, 8) for prompt in PROMPTS[:3]]


def test_an_adapter_trained_with_dropout_drafts_without_it(target: Target, tmp_path: Path) -> None:
    base = save_base("eagle", target, tmp_path / "base")
    folder = save_shaken(base, tmp_path / "shaken", 1, LoraSettings(rank=2, dropout=0.9))
    engine = AdapterEngine(target, load_drafter(base), {"sums": folder})
    request = GenerationSettings(max_new_tokens=20)
    found = engine.generate(PROMPTS, request, ["sums"] * len(PROMPTS))
    merged = Engine(target, adapted(load_drafter(base), folder)).generate(PROMPTS, request)
    assert [one.accepted for one in found] == [one.accepted for one in merged]


def test_an_adapter_of_another_target_or_drafter_is_refused(target: Target, tmp_path: Path) -> None:
    base = save_base("redrafter", target, tmp_path / "base")
    other = save_shaken(base, tmp_path / "other", 1, LoraSettings(rank=2), target_fingerprint="e" * 64)
    with pytest.raises(ValueError, match=r"adapter 'other' was trained for target .*eeee.*leave the adapter out"):
        AdapterEngine(target, load_drafter(base), {"other": other})
    eagle = save_base("eagle", target, tmp_path / "eagle")
    with pytest.raises(ValueError, match="not this one"):
        AdapterEngine(target, load_drafter(eagle), {"other": other})


def test_without_its_adapter_a_drafter_of_another_target_drafts_for_nobody(target: Target, tmp_path: Path) -> None:
    """The adapters' target is a fine-tuned one, the drafter below them is of what it was fine-tuned from."""
    base = tmp_path / "base"
    drafter = make("redrafter", target)
    drafter.config.target_fingerprint = "b" * 64
    drafter.save_pretrained(base)
    folder = save_shaken(base, tmp_path / "sums", 1, LoraSettings(rank=2))
    engine = AdapterEngine(target, load_drafter(base), {"sums": folder})
    request = GenerationSettings(max_new_tokens=8)
    [found] = engine.generate(PROMPTS[:1], request, ["sums"])
    assert found.token_ids == greedy_by_hand(target, PROMPTS[0], 8)
    with pytest.raises(ValueError, match="this one is of another target; name an adapter"):
        engine.generate(PROMPTS[:1], request, [None])


def test_rows_must_be_assigned_before_they_start(target: Target, tmp_path: Path) -> None:
    switch = AdapterSwitch(load_drafter(save_base("redrafter", target, tmp_path / "base")), {})
    with pytest.raises(ValueError, match="2 rows start, 0 were assigned"):
        Engine(target, switch).generate(PROMPTS[:2], GenerationSettings(max_new_tokens=4))


def test_riders_in_one_forward_take_no_adapters_of_single_rows(tmp_path: Path) -> None:
    target = deep_target()
    base, made = tmp_path / "base", RiderFamily().build(target.ends, None, 3, "")
    made.save_pretrained(base)
    folder = save_shaken(base, tmp_path / "sums", 1, LoraSettings(rank=2), target_fingerprint="")
    with pytest.raises(ValueError, match="merge one adapter into the drafter with `draftsmith export`"):
        AdapterEngine(target, load_drafter(base), {"sums": folder})
    request = GenerationSettings(max_new_tokens=6)
    [reply] = AdapterEngine(target, load_drafter(base), {}).generate(PROMPTS[:1], request, [None])
    assert reply.token_ids == greedy_by_hand(target, PROMPTS[0], 6)


def test_each_group_takes_in_what_the_target_chose_in_its_rows(
    target: Target, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = save_base("eagle", target, tmp_path / "base")
    folder = save_shaken(base, tmp_path / "sums", 1, LoraSettings(rank=2))
    taken: dict[int, set[tuple[int, int]]] = {1: set(), 2: set()}

    def keep(self: Eagle, state: DraftState, tree: DraftTree, choices_BN: Tensor) -> DraftState:
        roots, choices = tree.tokens_BN[:, 0].tolist(), choices_BN[:, 0].tolist()
        taken[len(roots)] |= set(zip(roots, choices, strict=True))
        return state

    monkeypatch.setattr(Eagle, "reads_choices", True)
    monkeypatch.setattr(Eagle, "take_choices", keep)
    engine = AdapterEngine(target, load_drafter(base), {"sums": folder}, MANNERS["dynamic"])
    replies = engine.generate(PROMPTS[:3], GenerationSettings(max_new_tokens=8), ["sums", None, "sums"])
    pairs = [set(pairwise(reply.token_ids)) for reply in replies]
    first = [tuple(reply.token_ids[:2]) for reply in replies]
    assert {first[0], first[2]} <= taken[2]
    assert first[1] in taken[1]
    assert first[1] not in pairs[0] | pairs[2]


@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_trees_of_groups_come_back_in_the_order_of_the_rows(data: st.DataObject) -> None:
    sizes = data.draw(st.lists(st.integers(1, 3), min_size=1, max_size=3))
    order = data.draw(st.permutations(range(sum(sizes))))
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 999)))
    trees, rows = [], []
    for size in sizes:
        paths = torch.randint(
            0, 3, (size, data.draw(st.integers(1, 3)), data.draw(st.integers(1, 3))), generator=generator
        )
        trees.append(tree_from_paths(torch.randint(0, 9, (size,), generator=generator), paths))
        rows.append(torch.tensor([order.pop() for _ in range(size)]))
    joint = in_batch_order(trees, rows)
    for tree, places in zip(trees, rows, strict=True):
        N = tree.num_nodes
        for number, place in enumerate(places.tolist()):
            for name in ("tokens_BN", "parents_BN", "depths_BN", "valid_BN"):
                assert torch.equal(getattr(joint, name)[place, :N], getattr(tree, name)[number])
            assert not joint.valid_BN[place, N:].any()
            own = tree.ancestors()[number][tree.valid_BN[number]]
            assert torch.equal(joint.ancestors()[place, :N, :N][tree.valid_BN[number]], own)


def test_the_pages_example_runs(target: Target, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base = save_base("redrafter", target, tmp_path / "base")
    for number, name in enumerate(("sums", "tales")):
        (tmp_path / name / "train").mkdir(parents=True)
        save_shaken(base, tmp_path / name / "train" / "drafter", number, LoraSettings(rank=2))
    page = (Path(__file__).resolve().parents[2] / "docs" / "how-to" / "drafters" / "adapters.md").read_text(
        encoding="utf-8"
    )
    [code] = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    known = {"target": target, "drafter": load_drafter(base)}
    exec(compile(code.replace("runs/", f"{tmp_path}/"), "docs/how-to/drafters/adapters.md", "exec"), known)
    assert capsys.readouterr().out.count("accepted in each cycle: [") == 3
