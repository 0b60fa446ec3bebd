"""Draft heads: each network by its equation, whose output head follows, and decoding as in training in every shape."""

from typing import Any

import pytest
import torch
from doubles import BOS, draft
from every_family import batch_of
from heads import deep_target
from torch import Tensor
from torch.nn import functional as F
from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaRotaryEmbedding

from draftsmith.decode.engine import Engine
from draftsmith.decode.sampling import GenerationSettings
from draftsmith.evaluate.doctor.serving import served_logits, trained_logits
from draftsmith.evaluate.doctor.tree_serving import tree_and_chain_logits
from draftsmith.evaluate.roofline.bytes_read import draft_bytes, tensor_bytes
from draftsmith.models import DraftLimits, SampledChildren, Target, data_rollout
from draftsmith.models.families.heads import HeadsConfig, HeadsDrafter, HeadsFamily
from draftsmith.models.target.target import PRE_NORM

STEPS, ANCHOR = 3, 6
SETTINGS: dict[str, dict[str, Any]] = {
    "medusa": {"network": "medusa", "num_blocks": 2},
    "medusa, its own heads": {"network": "medusa", "head": "per_step"},
    "blockwise": {"network": "blockwise", "rank": 0},
    "hydra": {"network": "hydra", "num_blocks": 2, "rank": 5},
    "hydra, its own heads": {"network": "hydra", "head": "per_step"},
    "hydra++": {"network": "hydra", "head": "per_step", "prefix_layer": True},
    "mlp, tied": {"network": "mlp", "inner_size": 24, "rank": 3},
    "mlp": {"network": "mlp", "inner_size": 24, "tied": False, "scale_input": True},
}
every_setting = pytest.mark.parametrize("name", SETTINGS)


@pytest.fixture(scope="module")
def target() -> Target:
    return deep_target()


def made(target: Target, name: str, draft_ids: Tensor | None = None) -> HeadsDrafter:
    """Random everywhere."""
    drafter = HeadsFamily(**SETTINGS[name]).build(target.ends, draft_ids, STEPS, "")
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in drafter.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
    return drafter.eval()


def rms(x: Tensor) -> Tensor:
    return x / (x.pow(2).mean(-1, keepdim=True) + 1e-6).sqrt()


def outputs_by_hand(drafter: HeadsDrafter, h: Tensor, tokens: list[int]) -> list[Tensor]:
    """What each step gives to its head, [E] each, from the tensors of a folder alone."""
    config, w = drafter.config, drafter.state_dict()

    def linear(name: str, x: Tensor) -> Tensor:
        return w[f"steps.{name}.weight"] @ x + w.get(f"steps.{name}.bias", torch.zeros(()))

    def blocks(x: Tensor, step: int, count: int) -> Tensor:
        for number in range(count):
            x = x + F.silu(linear(f"blocks.{step}.{number}.linear", x))
        return x

    outputs, state = [], rms(h) / 2**0.5 if config.scale_input else h
    for step, token in enumerate(tokens):
        if config.network == "medusa":
            outputs.append(blocks(h, step, config.num_blocks))
        elif config.network == "blockwise":
            outputs.append(h + linear(f"output.{step}", linear(f"hidden.{step}", h).clamp(min=0)))
        elif config.network == "hydra":
            state = torch.cat([state, drafter.ends.embed(torch.tensor(token))])
            outputs.append(
                blocks(
                    linear(f"skip.{step}", state) + F.silu(linear(f"first.{step}", state)), step, config.num_blocks - 1
                )
            )
        else:
            own, share = 0 if config.tied else step, 0.5 ** (0.5 / len(tokens))
            scale = (1 - share**2) ** 0.5 * (config.inner_size / 2) ** 0.5 / share
            z = linear(f"proj.{min(step, 1) if config.tied else step}", state)
            z = rms(z + scale * w[f"steps.emb.{own}.weight"][token])
            z = z * w[f"steps.ln.{own}.weight"] + w[f"steps.ln.{own}.bias"]
            state = z * (1 + torch.erf(z / 2**0.5)) / 2
            outputs.append(state)
    return outputs


def logits_by_hand(drafter: HeadsDrafter, outputs: list[Tensor]) -> Tensor:
    """[K, Vd]: with the target's head or the drafter's own, and what each step adds to it."""
    w, logits = drafter.state_dict(), []
    for step, y in enumerate(outputs):
        number = step if drafter.config.head == "per_step" else 0
        head = w.get(f"heads.{number}.weight", drafter.ends.head_weight)
        difference = w["difference.weight"] @ w[f"mix.{step}.weight"] if drafter.config.rank else torch.zeros(())
        logits.append((head + difference) @ y)
    return torch.stack(logits)


def after_prefix_layer(drafter: HeadsDrafter, states_TD: Tensor) -> Tensor:
    """[T, D]: the states behind Transformers' own Llama layer with the drafter's weights."""
    assert drafter.config.layer is not None
    config = drafter.config.layer.llama()
    config._attn_implementation = "eager"
    layer = LlamaDecoderLayer(config, 0)
    own = {name.removeprefix("prefix."): weight for name, weight in drafter.state_dict().items() if "prefix." in name}
    layer.load_state_dict({name.removeprefix("layer."): weight for name, weight in own.items()}, strict=True)
    mask = torch.full((len(states_TD), len(states_TD)), -torch.inf).triu(1)[None, None]
    rotation = LlamaRotaryEmbedding(config)(states_TD, torch.arange(len(states_TD))[None])
    return layer(states_TD[None], position_embeddings=rotation, attention_mask=mask)[0]


@every_setting
@torch.no_grad()
def test_training_computes_each_step_by_its_equation(target: Target, name: str) -> None:
    drafter = made(target, name)
    batch = batch_of(target, drafter)
    rollout = data_rollout(batch, STEPS)
    logits = drafter.rollout_logits(drafter.teacher_forced(batch, rollout))[:, ANCHOR]
    states = target.ends.final_norm(batch.hidden[PRE_NORM])
    if drafter.prefix is not None:
        states = after_prefix_layer(drafter, states)
    h = states[int(rollout.anchors[ANCHOR])]
    by_hand = logits_by_hand(drafter, outputs_by_hand(drafter, h, rollout.tokens[ANCHOR].tolist()))
    torch.testing.assert_close(logits, by_hand, rtol=1e-4, atol=1e-4)


@every_setting
@torch.no_grad()
def test_decoding_has_the_logits_of_training_and_a_tree_those_of_its_chains(target: Target, name: str) -> None:
    drafter = made(target, name, torch.arange(1, 64, 2))
    batch, roots = batch_of(target, drafter), [2, 7, 15]
    trained = trained_logits(drafter, batch, roots, STEPS)
    torch.testing.assert_close(served_logits(drafter, batch, roots, STEPS), trained, rtol=1e-4, atol=1e-4)
    in_tree, in_chain = tree_and_chain_logits(drafter, batch, 7)
    torch.testing.assert_close(in_tree, in_chain, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["blockwise", "hydra++", "mlp"])
def test_rows_get_the_targets_own_tokens_in_every_shape(target: Target, name: str) -> None:
    drafter, prompts = made(target, name), [[1, 5, 9], [1, 7, 7, 30, 2], [3]]
    shapes = (DraftLimits(2, STEPS), DraftLimits(3, STEPS, node_budget=7), DraftLimits(paths=((0,), (1,), (0, 0))))
    for temperature in (0.0, 1.0):
        settings = GenerationSettings(max_new_tokens=6, temperature=temperature)
        plain = [reply.token_ids for reply in Engine(target).generate(prompts, settings)]
        for limits in shapes:
            replies = Engine(target, drafter, limits).generate(prompts, settings, num_rows=2)
            assert [reply.token_ids for reply in replies] == plain
            fixed = Engine(target, drafter, limits, runner=lambda cycle: cycle).generate(prompts, settings, num_rows=2)
            assert [reply.token_ids for reply in fixed] == plain, "with the shapes of a compiled cycle"
    sampled = Engine(target, drafter, DraftLimits(sampled=SampledChildren((2, 1))))
    assert [len(reply.token_ids) for reply in sampled.generate(prompts, settings)] == [6, 6, 6]


@pytest.mark.parametrize("name", [name for name in SETTINGS if "mlp" not in name])
@torch.no_grad()
def test_fresh_steps_begin_as_the_targets_own_next_token_guess(target: Target, name: str) -> None:
    drafter = HeadsFamily(**SETTINGS[name]).build(target.ends, None, STEPS, "").eval()
    batch = batch_of(target, drafter)
    rollout = data_rollout(batch, STEPS)
    own = target.ends.logits(target.ends.final_norm(batch.hidden[PRE_NORM][rollout.anchors]))
    for logits in drafter.rollout_logits(drafter.teacher_forced(batch, rollout)):
        torch.testing.assert_close(logits, own, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_only_hydra_and_mlp_read_the_drafted_tokens(target: Target) -> None:
    reads = {}
    for name in SETTINGS:
        drafter = made(target, name)
        batch = batch_of(target, drafter)
        before = trained_logits(drafter, batch, [7], STEPS)
        batch.input_ids[8] = (batch.input_ids[8] + 1) % 64
        after = trained_logits(drafter, batch, [7], STEPS)
        reads[name] = (before != after).any(-1)[0].tolist()
    assert {name: steps for name, steps in reads.items() if any(steps)} == {
        name: [False, True, True] for name in SETTINGS if name.startswith(("hydra", "mlp"))
    }


def test_defaults_follow_the_network(target: Target) -> None:
    configs = {
        name: HeadsFamily(**settings).build(target.ends, None, 2, "").config for name, settings in SETTINGS.items()
    }
    assert [(config.head, config.rank, config.inner_size) for config in configs.values()] == [
        ("target", 64, 32),
        ("per_step", 0, 32),
        ("target", 0, 48),
        ("target", 5, 32),
        ("per_step", 0, 32),
        ("per_step", 0, 32),
        ("shared", 3, 24),
        ("per_step", 0, 24),
    ]


def test_the_mlp_speculator_begins_at_random_as_its_authors_have_it(target: Target) -> None:
    drafter = HeadsFamily(network="mlp", inner_size=64).build(target.ends, None, 4, "")
    tensors = drafter.state_dict()
    assert sorted(name for name in tensors if "proj" in name) == ["steps.proj.0.weight", "steps.proj.1.weight"]
    for name in ("steps.emb.0.weight", "steps.proj.1.weight", "heads.0.weight"):
        assert abs(float(tensors[name].std()) - 64**-0.5) < 0.02, name
    assert torch.equal(tensors["steps.ln.0.weight"], torch.ones(64))


def test_a_draft_reads_what_all_steps_share_as_often_as_it_runs(target: Target) -> None:
    at_once, one_by_one = (made(target, name) for name in ("medusa", "hydra"))
    assert len(draft_bytes(at_once, DraftLimits(1, STEPS)).steps) == 1
    counted = draft_bytes(one_by_one, DraftLimits(1, STEPS))
    assert counted.once == sum(
        tensor_bytes(weight) for name, weight in one_by_one.named_parameters() if "difference" not in name
    )
    assert counted.steps == (64 * 32 * 4 + 64 * 5 * 4,) * STEPS, "the target's head, and the difference"


def test_settings_that_do_not_fit_name_the_field(target: Target) -> None:
    with pytest.raises(ValueError, match=r"rank 4 and head 'per_step', but only steps that share a head .* use rank 0"):
        HeadsFamily(head="per_step", rank=4).build(target.ends, None, 3, "")
    with pytest.raises(ValueError, match=r"inner_size 24 and head 'target', whose rows have 32 numbers"):
        HeadsFamily(network="mlp", head="target", inner_size=24).build(target.ends, None, 3, "")
    unread: tuple[dict[str, Any], ...] = (
        {"network": "medusa", "inner_size": 24},
        {"network": "mlp", "num_blocks": 2},
        {"network": "hydra", "tied": False},
        {"network": "blockwise", "scale_input": True},
    )
    for settings in unread:
        [(_, network), (name, value)] = settings.items()
        with pytest.raises(ValueError, match=rf"{name} {value} and network '{network}', but the field is for .* alone"):
            HeadsFamily(**settings).build(target.ends, None, 3, "")
    with pytest.raises(ValueError, match="HeadsConfig has no depth; its fields are"):
        HeadsDrafter.for_target(target.ends, depth=2)
    config = HeadsFamily(prefix_layer=True).build(target.ends, None, 3, "").config
    assert config.prefix_layer is not None
    for change, message in (({"head_dim": 3}, "head_dim is 3"), ({"depth": 2}, "prefix_layer with depth")):
        changed = HeadsConfig.from_dict(config.to_dict() | {"prefix_layer": config.prefix_layer | change})
        with pytest.raises(ValueError, match=message):
            HeadsDrafter(changed)
    with pytest.raises(ValueError, match="a draft of 4 tokens is asked for"):
        draft(target, made(target, "mlp"), [[BOS, 5]], DraftLimits(1, STEPS + 1))
    with pytest.raises(ValueError, match="a head for each step, so it has no head_weight"):
        _ = made(target, "mlp").head_weight
