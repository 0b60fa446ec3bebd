"""Block drafters: the forward by hand from the papers' equations, both layouts and masks, decoding."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from doubles import BOS, draft, ragged_drafts, random_target, served_logits
from every_family import batch_of
from heads import deep_target
from torch import Tensor

from draftsmith.decode.engine import Engine
from draftsmith.decode.sampling import GenerationSettings
from draftsmith.evaluate.doctor.serving import served_logits as served_in_a_row
from draftsmith.evaluate.doctor.serving import trained_logits
from draftsmith.evaluate.doctor.tree_serving import tree_and_chain_logits
from draftsmith.evaluate.roofline.bytes_read import draft_bytes
from draftsmith.models import DraftLimits, PackedBatch, SampledChildren, Target, data_rollout
from draftsmith.models.drafters.draft_records import Cycle, Emitted, Opening
from draftsmith.models.families.block import BlockDrafter, BlockFamily, default_layers
from draftsmith.models.families.block.block_correction import (
    GatedCorrection,
    GruCorrection,
    LookAround,
    RecurrentCorrection,
    correction_of,
)
from draftsmith.models.families.block.block_layer import BlockAttention

STEPS = 4
VARIANTS = [(causal, anchor) for causal in (False, True) for anchor in (False, True)]
every_variant = pytest.mark.parametrize(("causal", "from_anchor"), VARIANTS)


@pytest.fixture(scope="module")
def target() -> Target:
    return deep_target()


def made(target: Target, causal: bool = False, from_anchor: bool = False, **chosen: object) -> BlockDrafter:
    """Two layers over three of the target's, random everywhere."""
    drafter = BlockDrafter.for_target(
        target.ends,
        layers=["layer.1.output", "layer.3.output", "layer.5.output"],
        num_draft_layers=2,
        causal=causal,
        sample_from_anchor=from_anchor,
        num_draft_steps=STEPS,
        **chosen,  # type: ignore[arg-type]
    )
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in drafter.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
    return drafter.eval()


def by_hand(drafter: BlockDrafter, context: Tensor, root: int) -> Tensor:
    """[K, D]: one block behind ``context`` [t + 1, n D], one slot and one head at a time, from the tensors of a folder alone."""
    config, tensors, eps = drafter.config, drafter.state_dict(), drafter.config.rms_norm_eps
    size, position = config.head_dim, len(context)

    def norm(x: Tensor, name: str) -> Tensor:
        return x / (x.pow(2).mean(-1, keepdim=True) + eps).sqrt() * tensors[f"{name}.weight"]

    def turn(x: Tensor, at: int) -> Tensor:
        cosines, sines = drafter.rotation(torch.tensor(at), x)
        left, right = x[: size // 2], x[size // 2 :]
        return x * cosines[0] + torch.cat([-right, left]) * sines[0]

    known = norm(context @ tensors["fc.weight"].T, "hidden_norm")
    mask = tensors["mask_embedding"]
    x = torch.stack([drafter.ends.embed(torch.tensor(root))] + [mask] * (config.block_size - 1))
    for number in range(config.num_draft_layers):
        name = f"layers.{number}"
        inputs = norm(x, f"{name}.input_layernorm")
        sources = torch.cat([known, inputs])
        keys, values = (sources @ tensors[f"{name}.self_attn.{part}_proj.weight"].T for part in "kv")
        queries = inputs @ tensors[f"{name}.self_attn.q_proj.weight"].T
        attended = []
        for slot in range(config.block_size):
            last = position + slot + 1 if config.causal else len(sources)
            heads = []
            for head in range(config.num_attention_heads):
                group = head // (config.num_attention_heads // config.num_key_value_heads)
                at, of_group = slice(head * size, head * size + size), slice(group * size, group * size + size)
                query = turn(norm(queries[slot, at], f"{name}.self_attn.q_norm"), position + slot)
                seen = [turn(norm(keys[i, of_group], f"{name}.self_attn.k_norm"), i) for i in range(last)]
                scores = torch.stack(seen) @ query / size**0.5
                heads.append(scores.softmax(0) @ values[:last, of_group])
            attended.append(torch.cat(heads))
        x = x + torch.stack(attended) @ tensors[f"{name}.self_attn.o_proj.weight"].T
        inputs = norm(x, f"{name}.post_attention_layernorm")
        gate, up = (inputs @ tensors[f"{name}.mlp.{part}_proj.weight"].T for part in ("gate", "up"))
        x = x + (torch.nn.functional.silu(gate) * up) @ tensors[f"{name}.mlp.down_proj.weight"].T
    return norm(x, "norm")[0 if config.sample_from_anchor else 1 :]


@every_variant
@torch.no_grad()
def test_training_computes_each_block_as_by_hand(target: Target, causal: bool, from_anchor: bool) -> None:
    drafter = made(target, causal, from_anchor)
    batch = batch_of(target, drafter)
    rollout = data_rollout(batch, STEPS)
    outputs = drafter.teacher_forced(batch, rollout)
    states = torch.cat([batch.hidden[name] for name in drafter.features], dim=-1)
    anchor, root = int(rollout.anchors[6]), int(rollout.tokens[6, 0])
    torch.testing.assert_close(outputs[:, 6], by_hand(drafter, states[: anchor + 1], root), rtol=1e-4, atol=1e-4)


@every_variant
@torch.no_grad()
def test_packed_samples_give_what_single_ones_give(target: Target, causal: bool, from_anchor: bool) -> None:
    drafter = made(target, causal, from_anchor)
    whole = batch_of(target, drafter)
    cuts = [(0, 9), (9, 13), (13, 24)]
    parts = [
        PackedBatch(
            whole.input_ids[start:end],
            torch.arange(end - start) >= 2,
            torch.zeros(end - start, dtype=torch.int64),
            torch.arange(end - start),
            {name: states[start:end] for name, states in whole.hidden.items()},
        )
        for start, end in cuts
    ]
    both = replace(
        whole,
        loss_mask=torch.cat([part.loss_mask for part in parts]),
        document_ids=torch.cat([torch.full_like(part.document_ids, number) for number, part in enumerate(parts)]),
        positions=torch.cat([part.positions for part in parts]),
    )
    rollout = data_rollout(both, STEPS)
    apart = torch.cat([drafter.teacher_forced(part, data_rollout(part, STEPS)) for part in parts], dim=1)
    valid = rollout.valid.T
    torch.testing.assert_close(drafter.teacher_forced(both, rollout)[valid], apart[valid], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("causal", "window", "from_root"),
    [
        (False, None, False),
        (True, None, False),
        (False, 40, False),
        (True, 3, False),
        (False, 40, True),
        (True, 2, True),
    ],
)
def test_attention_without_score_matrices_equals_the_dense_one(
    causal: bool, window: int | None, from_root: bool
) -> None:
    generator = torch.Generator().manual_seed(0)

    def rows(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    batch = PackedBatch(
        torch.zeros(170, dtype=torch.int64),
        torch.ones(170, dtype=torch.bool),
        torch.tensor([0] * 7 + [1] * 4 + [2] * 159),
        torch.cat([torch.arange(7), torch.arange(4), torch.arange(159)]),
        {},
    )
    anchors = torch.cat([torch.tensor([2, 3, 8]), torch.arange(12, 169, 3)])
    queries, own = rows(len(anchors) * 3, 4, 8), (rows(len(anchors) * 3, 2, 8), rows(len(anchors) * 3, 2, 8))
    text = rows(170, 2, 8), rows(170, 2, 8)
    dense, flexible = (
        BlockAttention(batch, anchors, 3, causal, text, flexible, window, from_root).over(text)(queries, [own])
        for flexible in (False, True)
    )
    torch.testing.assert_close(flexible, dense, rtol=1e-4, atol=1e-5)


@every_variant
@torch.no_grad()
def test_a_shorter_draft_has_the_logits_of_a_longer_one(target: Target, causal: bool, from_anchor: bool) -> None:
    drafter = made(target, causal, from_anchor)
    text = [BOS, 5, 6, 20, 21, 22, 23, 24, 5]
    long, short = served_logits(target, drafter, text, STEPS), served_logits(target, drafter, text[:-2], STEPS - 2)
    torch.testing.assert_close(short, long[: STEPS - 2], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("causal", "limits", "temperature"),
    [
        (False, DraftLimits(3, STEPS, node_budget=7), 0.0),
        (True, DraftLimits(1, 2), 1.0),
        (False, DraftLimits(paths=((0,), (1,), (0, 0))), 1.0),
    ],
    ids=["tree", "chain", "static"],
)
def test_rows_of_different_lengths_get_the_targets_own_tokens(
    target: Target, causal: bool, limits: DraftLimits, temperature: float
) -> None:
    drafter, prompts = made(target, causal, draft_token_ids=torch.arange(1, 64, 2)), [[1, 5, 9], [1, 7, 7, 30, 2], [3]]
    settings = GenerationSettings(max_new_tokens=6, temperature=temperature)
    plain = Engine(target).generate(prompts, settings)
    drafted = Engine(target, drafter, limits).generate(prompts, settings, num_rows=2)
    assert [reply.token_ids for reply in drafted] == [reply.token_ids for reply in plain]


def test_a_sampled_chain_drafts_and_ends(target: Target) -> None:
    drafter = made(target)
    limits = DraftLimits(sampled=SampledChildren((1,) * STEPS))
    settings = GenerationSettings(max_new_tokens=6, temperature=1.0)
    replies = Engine(target, drafter, limits).generate([[1, 5, 9], [1, 7]], settings)
    assert [len(reply.token_ids) for reply in replies] == [6, 6]


WINDOWED: list[tuple[list[int], bool, dict[str, bool]]] = [
    ([0, 1], False, {}),
    ([1], False, {"sliding_causal": True}),
    ([0, 1], False, {"sliding_causal": True}),
    ([0], True, {}),
    ([0, 1], False, {"window_from_root": True}),
    ([1], False, {"window_from_root": True, "sliding_causal": True}),
]
every_window = pytest.mark.parametrize(("layers", "causal", "chosen"), WINDOWED)


@every_window
@torch.no_grad()
def test_a_sliding_window_is_the_same_in_training_and_in_decoding(
    target: Target, layers: list[int], causal: bool, chosen: dict[str, bool]
) -> None:
    drafter = made(target, causal, sliding_window=6, sliding_layers=layers, **chosen)
    batch, roots = batch_of(target, drafter), [2, 7, 15]
    trained = trained_logits(drafter, batch, roots, STEPS)
    torch.testing.assert_close(served_in_a_row(drafter, batch, roots, STEPS), trained, rtol=1e-4, atol=1e-4)
    in_tree, in_chain = tree_and_chain_logits(drafter, batch, 7)
    torch.testing.assert_close(in_tree, in_chain, rtol=1e-4, atol=1e-4)
    long = made(target, causal, sliding_window=64, sliding_layers=layers, **chosen)
    unbounded = trained_logits(long, batch, roots, STEPS)
    torch.testing.assert_close(served_in_a_row(long, batch, roots, STEPS), unbounded, rtol=1e-4, atol=1e-4)
    assert (unbounded - trained).abs().amax((1, 2))[2] > 1e-2, "the last root has more text than the window"
    plain = trained_logits(made(target, causal), batch, roots, STEPS)
    assert torch.allclose(unbounded, plain, atol=1e-4) is not chosen.get("sliding_causal", False)
    other = made(
        target,
        causal,
        sliding_window=6,
        sliding_layers=layers,
        **chosen | {"window_from_root": "window_from_root" not in chosen},
    )
    elsewhere = trained_logits(other, batch, roots, STEPS)
    assert (elsewhere - trained).abs().amax((1, 2))[2] > 1e-3, "where the window begins makes a difference"


@every_window
def test_rows_of_a_batch_draft_with_a_window_as_they_do_alone(
    target: Target, layers: list[int], causal: bool, chosen: dict[str, bool]
) -> None:
    drafter = made(target, causal, sliding_window=6, sliding_layers=layers, **chosen)
    texts = torch.randint(0, 64, (3, 18), generator=torch.Generator().manual_seed(3)).tolist()
    roots = [[11, 1, 3], [12, 5, 6], [16, 6, 8]]

    @torch.no_grad()
    def logits(rows: list[int], fixed: bool) -> list[Tensor]:
        places = [[each[row] for row in rows] for each in roots]
        drafts = ragged_drafts(target, drafter, [texts[row] for row in rows], places, DraftLimits(1, STEPS), fixed)
        return [draft.slot_logits() for draft in drafts]  # type: ignore[attr-defined]

    for fixed in (False, True):
        together = logits([0, 1, 2], fixed)
        for row in range(3):
            for ours, alone in zip(together, logits([row], fixed=False), strict=True):
                torch.testing.assert_close(ours[row], alone[0], rtol=1e-4, atol=1e-4)


@every_window
def test_a_batch_decodes_with_a_window_what_its_rows_decode_alone(
    target: Target, layers: list[int], causal: bool, chosen: dict[str, bool]
) -> None:
    drafter = made(target, causal, sliding_window=6, sliding_layers=layers, **chosen)
    prompts, settings = (
        [[1, 5, 9, 8, 40, 41, 3, 7, 30, 2, 6, 5], [1, 7], [3, 4, 9, 11]],
        GenerationSettings(max_new_tokens=8),
    )
    plain = [reply.token_ids for reply in Engine(target).generate(prompts, settings)]
    for limits in (DraftLimits(1, 2), DraftLimits(3, STEPS, node_budget=7)):
        engine = Engine(target, drafter, limits)
        together, fixed = (
            each.generate(prompts, settings)
            for each in (engine, Engine(target, drafter, limits, runner=lambda cycle: cycle))
        )
        assert [reply.token_ids for reply in together] == plain
        for prompt, row, other in zip(prompts, together, fixed, strict=True):
            [alone] = engine.generate([prompt], settings)
            assert (row.token_ids, row.accepted) == (alone.token_ids, alone.accepted)
            assert (other.token_ids, other.accepted) == (alone.token_ids, alone.accepted)


def test_the_first_token_of_a_window_moves_with_the_slot(target: Target) -> None:
    batch = batch_of(target, made(target))
    attention = BlockAttention(
        batch, torch.tensor([1, 9]), 3, False, (torch.zeros(24, 1, 1), torch.zeros(24, 1, 1)), False, 4
    )
    assert attention._first_seen(1).tolist() == [0, 0, 1, 7, 8, 9]
    attention.from_root = True
    assert attention._first_seen(1).tolist() == [0, 0, 0, 6, 6, 6]


def test_every_layer_takes_the_window_of_the_settings(target: Target) -> None:
    drafter = BlockFamily(num_draft_layers=2, sliding_window=9).build(target.ends, None, STEPS, "")
    assert (drafter.config.sliding_window, drafter.config.sliding_layers) == (9, [0, 1])
    of_package = BlockFamily(sliding_window=9, window_from_root=True).build(target.ends, None, STEPS, "")
    assert (of_package.config.window_from_root, drafter.config.window_from_root) == (True, False)
    assert [each.window for each in drafter.key_values()] == [9, 9]
    assert [each.window for each in made(target, sliding_window=9, sliding_layers=[1]).key_values()] == [None, 9]
    for chosen, message in (
        ({"sliding_window": 4, "sliding_layers": [0]}, "sliding_window 4 and block_size 5, but a block lies within"),
        ({"sliding_window": 9}, r"sliding_window 9, sliding_layers \[\] and sliding_causal false"),
        ({"sliding_causal": True}, "sliding_window None, .* sliding_causal true"),
        ({"window_from_root": True}, "window_from_root true and no sliding_window"),
        ({"sliding_window": 9, "sliding_layers": [2]}, r"sliding_layers \[2\], which are not below num_draft_layers 2"),
    ):
        with pytest.raises(ValueError, match=message):
            made(target, **chosen)  # type: ignore[arg-type]


@torch.no_grad()
def test_biases_of_attention_decode_as_they_train(target: Target) -> None:
    drafter, plain = made(target, attention_bias=True), made(target)
    assert drafter.state_dict().keys() - plain.state_dict().keys() == {
        f"layers.{layer}.self_attn.{part}_proj.bias" for layer in (0, 1) for part in "qkvo"
    }
    batch, roots = batch_of(target, drafter), [2, 7, 15]
    trained = trained_logits(drafter, batch, roots, STEPS)
    torch.testing.assert_close(served_in_a_row(drafter, batch, roots, STEPS), trained, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_a_draft_after_cycles_without_one_is_the_same(target: Target) -> None:
    drafter = made(target)
    batch, limits = batch_of(target, drafter), DraftLimits(1, STEPS)

    def emitted(before: int, root: int) -> Emitted:
        states = {name: batch.hidden[name][None, before:root] for name in drafter.features}
        return Emitted(batch.input_ids[None, before + 1 : root + 1], states, torch.tensor([root - before]))

    def logits(followed: bool) -> Tensor:
        state = drafter.start(Opening(emitted(0, 5), batch.input_ids[:1], limits, room=24))
        first, second = Cycle(torch.tensor([5]), [5], [5]), Cycle(torch.tensor([8]), [8], [3])
        state = drafter.follow(state, first, limits)
        if followed:
            state = drafter.advance(state, emitted(5, 7))
            state = drafter.follow(state, Cycle(torch.tensor([7]), [7], [2]), limits)
            state, second = drafter.advance(state, emitted(7, 8)), Cycle(torch.tensor([8]), [8], [1])
        else:
            state = drafter.advance(state, emitted(5, 8))
        return drafter.expander(state, second, limits).begin()

    torch.testing.assert_close(logits(True), logits(False), rtol=1e-5, atol=1e-5)


CORRECTIONS = ("vanilla", "gated", "recurrent", "gru")


@pytest.mark.parametrize("from_anchor", [False, True])
@pytest.mark.parametrize("kind", CORRECTIONS)
@torch.no_grad()
def test_a_correction_decodes_as_it_trains(target: Target, kind: str, from_anchor: bool) -> None:
    drafter = made(target, False, from_anchor, correction=kind, correction_rank=5, correction_state=6)
    batch, roots = batch_of(target, drafter), [2, 7, 15]
    trained = trained_logits(drafter, batch, roots, STEPS)
    torch.testing.assert_close(served_in_a_row(drafter, batch, roots, STEPS), trained, rtol=1e-4, atol=1e-4)
    in_tree, in_chain = tree_and_chain_logits(drafter, batch, 7)
    torch.testing.assert_close(in_tree, in_chain, rtol=1e-4, atol=1e-4)
    other = replace(batch, input_ids=batch.input_ids.clone())
    other.input_ids[8] = (other.input_ids[8] + 1) % 64
    changed = trained_logits(drafter, other, roots, STEPS)[1] != trained[1]
    assert changed.any(-1).tolist() == [False, True, kind in ("recurrent", "gru"), kind in ("recurrent", "gru")]


@pytest.mark.parametrize("kind", [*CORRECTIONS, "lookaround"])
@torch.no_grad()
def test_a_fresh_correction_changes_nothing(target: Target, kind: str) -> None:
    chosen = {"layers": ["layer.3.output"], "num_draft_steps": 3, "correction_rank": 4, "correction_state": 4}
    drafter = BlockDrafter.for_target(target.ends, correction=kind, **chosen).eval()  # type: ignore[arg-type]
    plain = BlockDrafter.for_target(target.ends, **chosen).eval()  # type: ignore[arg-type]
    plain.load_state_dict(drafter.state_dict(), strict=False)
    batch = batch_of(target, drafter)
    torch.testing.assert_close(trained_logits(drafter, batch, [7], 3), trained_logits(plain, batch, [7], 3))


@every_variant
@torch.no_grad()
def test_slots_look_around_in_decoding_as_in_training_and_as_the_equation_says(
    target: Target, causal: bool, from_anchor: bool
) -> None:
    drafter = made(target, causal, from_anchor, correction="lookaround", correction_rank=5)
    batch, roots = batch_of(target, drafter), [2, 7, 15]
    trained = trained_logits(drafter, batch, roots, STEPS)
    torch.testing.assert_close(served_in_a_row(drafter, batch, roots, STEPS), trained, rtol=1e-4, atol=1e-4)
    in_tree, in_chain = tree_and_chain_logits(drafter, batch, 7)
    torch.testing.assert_close(in_tree, in_chain, rtol=1e-4, atol=1e-4)
    text = [BOS, 5, 6, 20, 21, 22, 23, 24, 5]
    long, short = served_logits(target, drafter, text, STEPS), served_logits(target, drafter, text[:-2], STEPS - 2)
    torch.testing.assert_close(short, long[: STEPS - 2], rtol=1e-4, atol=1e-4)
    rollout = data_rollout(batch, STEPS)
    inputs_KAD = drafter.teacher_forced(batch, rollout)[:, 6]
    hidden, own, layer = inputs_KAD[:, :32], inputs_KAD[:, 32:], drafter.correction
    assert isinstance(layer, LookAround)
    chances, ids = (hidden @ drafter.head_weight.T).topk(16)
    soft = torch.stack([row.softmax(0) @ drafter.embed(each) for row, each in zip(chances, ids, strict=True)])
    near = [drafter.embed(rollout.tokens[6, 0]), *soft]  # the root comes before slot 0
    for slot in range(STEPS):
        seen = [at for at in range(-1, STEPS) if abs(at - slot) <= 2 and (at < slot or not causal)]
        query = layer.query.weight @ hidden[slot]
        scores = [query @ (layer.key.weight @ near[at + 1]) / 5**0.5 + layer.offsets[at - slot + 2] for at in seen]
        values = torch.stack([layer.value.weight @ near[at + 1] for at in seen])
        attended = torch.stack(scores).softmax(0) @ values
        expected = torch.nn.functional.silu(layer.mix(torch.cat([hidden[slot], attended])))
        torch.testing.assert_close(own[slot], expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("shape", [DraftLimits(1, STEPS), DraftLimits(3, STEPS, node_budget=9)])
def test_replies_of_slots_that_look_around_are_the_targets_own(target: Target, shape: DraftLimits) -> None:
    drafter, prompts = made(target, correction="lookaround", correction_rank=5), [[1, 5, 9], [1, 7, 7, 30, 2], [3]]
    for temperature in (0.0, 1.0):
        settings = GenerationSettings(max_new_tokens=8, temperature=temperature)
        plain = Engine(target).generate(prompts, settings)
        drafted = Engine(target, drafter, shape).generate(prompts, settings, num_rows=2)
        assert [reply.token_ids for reply in drafted] == [reply.token_ids for reply in plain]


@torch.no_grad()
def test_corrections_are_those_of_the_papers(target: Target) -> None:
    hidden, token, sizes = torch.randn(3, 32), torch.tensor([4, 9, 4]), (32, 64, 64, 5, 6)
    state = torch.randn(3, 5)
    embedded = target.ends.embed(token)
    gated = correction_of("gated", *sizes)
    recurrent, gru = correction_of("recurrent", *sizes), correction_of("gru", *sizes)
    assert isinstance(gated, GatedCorrection)
    assert isinstance(recurrent, RecurrentCorrection)
    assert isinstance(gru, GruCorrection)
    of_token = gated.tokens.weight[token]
    gate = torch.sigmoid(torch.cat([hidden, of_token], 1) @ gated.gate_proj.weight.T + gated.gate_proj.bias)
    torch.testing.assert_close(gated.step(token, embedded, hidden, state, 1)[0], gate * of_token)
    joined = torch.cat([state, recurrent.tokens.weight[token], hidden], 1)
    kept, candidate, output = (joined @ recurrent.joint_proj.weight.T + recurrent.joint_proj.bias).split(5, 1)
    part, after = recurrent.step(token, embedded, hidden, state, 1)
    torch.testing.assert_close(part, output.tanh())
    torch.testing.assert_close(after, kept.sigmoid() * state + (1 - kept.sigmoid()) * candidate.tanh())
    whole = torch.nn.GRU(32, 6, bias=False)
    whole.load_state_dict({f"{name}_l0": weight for name, weight in gru.gru.named_parameters()})
    part, after = gru.step(token, embedded, hidden, gru.begin(hidden), 1)
    torch.testing.assert_close(after, whole(embedded[None])[0][0])
    torch.testing.assert_close(part, torch.nn.functional.silu(torch.cat([hidden, after], 1) @ gru.input.weight.T))
    assert not gru.step(token, embedded, hidden, gru.begin(hidden), 0)[0].any(), "the first slot stays as it is"


@torch.no_grad()
def test_a_fresh_dflash_2_drafts_what_its_block_drafts(target: Target) -> None:
    plain = made(target)
    fresh = BlockDrafter.for_target(
        target.ends, layers=list(plain.config.layers), num_draft_layers=2, num_draft_steps=STEPS,
        convolution=True, correction="selector", correction_rank=5, candidates=6,
    ).eval()  # fmt: skip
    absent = fresh.load_state_dict(plain.state_dict(), strict=False)
    assert not absent.unexpected_keys
    batch = batch_of(target, plain)
    before, after = (trained_logits(each, batch, [2, 7], STEPS) for each in (plain, fresh))
    best, ids = before.topk(6)
    torch.testing.assert_close(after.gather(-1, ids), best, rtol=1e-4, atol=1e-4)
    assert bool(((after > -torch.inf).sum(-1) == 6).all()), "and nothing else"


@pytest.mark.parametrize("from_anchor", [False, True])
@torch.no_grad()
def test_a_dflash_2_decodes_as_it_was_trained_and_the_target_stays_itself(target: Target, from_anchor: bool) -> None:
    drafter = made(
        target, from_anchor=from_anchor, convolution=True, correction="selector", correction_rank=5, candidates=6
    )
    batch, roots = batch_of(target, drafter), [2, 7, 15]
    trained = trained_logits(drafter, batch, roots, STEPS)
    torch.testing.assert_close(served_in_a_row(drafter, batch, roots, STEPS), trained, rtol=1e-4, atol=1e-4)
    in_tree, in_chain = tree_and_chain_logits(drafter, batch, 7)
    torch.testing.assert_close(in_tree, in_chain, rtol=1e-4, atol=1e-4)
    settings, prompts = GenerationSettings(max_new_tokens=8), [[1, 5, 9], [1, 7, 7, 30]]
    plain = [reply.token_ids for reply in Engine(target).generate(prompts, settings)]
    for limits in (DraftLimits(1, STEPS), DraftLimits(3, STEPS, node_budget=7), DraftLimits(10, 2, node_budget=14)):
        drafted = Engine(target, drafter, limits).generate(prompts, settings)
        assert [reply.token_ids for reply in drafted] == plain
    sampled = Engine(target, drafter, DraftLimits(sampled=SampledChildren((2, 1))))
    settings = GenerationSettings(max_new_tokens=6, temperature=1.0)
    assert [len(reply.token_ids) for reply in sampled.generate(prompts, settings)] == [6, 6]


def test_recomputed_activations_give_the_same_gradients(target: Target) -> None:
    drafter = made(target)
    batch = batch_of(target, drafter)
    rollout = data_rollout(batch, STEPS)
    grads = []
    for recompute in (False, True):
        drafter.recompute = recompute
        drafter.zero_grad()
        drafter.teacher_forced(batch, rollout).square().sum().backward()
        grads.append([parameter.grad for parameter in drafter.parameters()])
    assert all(grad is not None for grad in grads[0])
    torch.testing.assert_close(grads[0], grads[1])


def test_a_batch_without_a_supervised_token_still_reaches_every_weight(target: Target) -> None:
    drafter = made(target)
    batch = replace(batch_of(target, drafter), loss_mask=torch.zeros(24, dtype=torch.bool))
    outputs = drafter.teacher_forced(batch, data_rollout(batch, 2))
    assert outputs.shape[:2] == (2, 0)
    outputs.sum().backward()
    assert not [name for name, weight in drafter.named_parameters() if weight.grad is None]


def test_an_unused_token_fills_the_slots_where_its_id_is_given(target: Target) -> None:
    drafter = made(target, mask_token_id=63)
    assert "mask_embedding" not in drafter.state_dict()
    slots = drafter.slots(torch.tensor([5, 6]), 3)
    torch.testing.assert_close(slots[1], drafter.embed(torch.tensor([6, 63, 63])))


@pytest.mark.parametrize("kept", [None, [3, 9, 30, 44, 63]])
@torch.no_grad()
def test_the_token_of_empty_slots_is_never_drafted(target: Target, kept: list[int] | None) -> None:
    ids = None if kept is None else torch.tensor(kept)
    drafter, place = made(target, mask_token_id=63, draft_token_ids=ids), -1
    batch, roots = batch_of(target, drafter), [2, 7]
    for logits in (trained_logits(drafter, batch, roots, STEPS), served_in_a_row(drafter, batch, roots, STEPS)):
        assert bool((logits[..., place] == -torch.inf).all())
        assert bool(logits[..., :place].isfinite().all())


def test_an_engine_drafts_no_deeper_than_the_block_by_itself(target: Target) -> None:
    drafter = BlockFamily().build(target.ends, None, 2, "")
    assert Engine(target, drafter).limits == DraftLimits(draft_length=2)
    assert Engine(target, made(target)).limits == DraftLimits(draft_length=4)


def test_a_draft_reads_its_weights_once(target: Target) -> None:
    drafter = made(target)
    assert len(draft_bytes(drafter, DraftLimits(1, STEPS)).steps) == 1


def test_the_layers_read_are_spread_evenly() -> None:
    assert default_layers(36, 5) == tuple(f"layer.{block}.output" for block in (1, 9, 17, 25, 33))
    assert default_layers(36, 1) == ("layer.18.output",)
    assert default_layers(8, 2) == ("layer.1.output", "layer.5.output")
    assert default_layers(4, 3) == ("layer.0.output", "layer.2.output", "last.pre_norm")
    assert default_layers(2, 5) == ("layer.0.output", "last.pre_norm")


def test_settings_that_do_not_fit_name_the_field(target: Target) -> None:
    with pytest.raises(ValueError, match="mask_token_id 64, which is not below the target's vocabulary of 64"):
        BlockFamily(mask_token_id=64).build(target.ends, None, 3, "")
    with pytest.raises(ValueError, match=r"layers \[\], but it reads at least one"):
        BlockFamily(layers=[]).build(target.ends, None, 3, "")
    with pytest.raises(ValueError, match="a draft of 5 tokens is asked for"):
        draft(target, made(target), [[BOS, 5]], DraftLimits(1, STEPS + 1))


def test_targets_without_rotary_settings_get_a_drafter_too() -> None:
    target = random_target("gpt2")
    drafter = BlockFamily().build(target.ends, None, 3, "").eval()
    tree = draft(target, drafter, [[BOS, 5, 6, 7]], DraftLimits(3, 3, node_budget=6))
    assert int(tree.valid_BN.sum()) == 7


def test_a_fresh_block_drafter_drafts_seven_tokens_and_takes_no_other_block_size(target: Target) -> None:
    assert BlockDrafter.for_target(target.ends, layers=["layer.1.output"]).max_draft_steps == 7
    with pytest.raises(ValueError, match=r"block_size is 16, .* give num_draft_steps instead"):
        BlockDrafter.for_target(target.ends, layers=["layer.1.output"], block_size=16)
