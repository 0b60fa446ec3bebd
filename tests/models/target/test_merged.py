"""Merged matrices and norms: the same logits from fewer operations, no more weights, and families that are left as they are."""

from __future__ import annotations

import pytest
import torch
from doubles import random_target
from torch import nn

from draftsmith.decode import Engine, GenerationSettings
from draftsmith.models import Target
from draftsmith.models.target.options import DEFAULTS
from draftsmith.models.trunk.merged import MergedFirst, MergedNorm, MergedOther, merge, split
from draftsmith.models.trunk.proof import few_logits

PROMPT = [[0, 5, 9, 11]]


def logits(target: Target) -> torch.Tensor:
    return few_logits(target._trunk, target.model, target.ends.logits)


def num_weights(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def kinds(target: Target) -> set[type]:
    return {type(module) for block in target._trunk.blocks for module in block.modules()}


def test_a_merged_target_says_the_same_with_the_same_weights() -> None:
    target = random_target()
    before, weights = logits(target), num_weights(target)
    target.merge()
    assert all(any(issubclass(own, kind) for own in kinds(target)) for kind in (MergedFirst, MergedOther, MergedNorm))
    assert isinstance(target.ends.norm, MergedNorm)
    torch.testing.assert_close(logits(target), before)
    assert num_weights(target) == weights
    assert len({parameter.untyped_storage().data_ptr() for parameter in target.model.parameters()}) < len(
        list(target.model.parameters())
    )


def test_parameters_keep_their_names_and_numbers() -> None:
    target = random_target()
    before = {name: tensor.clone() for name, tensor in target.model.state_dict().items()}
    target.merge()
    after = target.model.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())


def test_weights_that_are_changed_in_place_or_moved_are_the_ones_that_compute() -> None:
    target, other = random_target(), random_target(seed=3)
    target.merge()
    target.model.load_state_dict(other.model.state_dict())
    torch.testing.assert_close(logits(target), logits(other))
    target.double()
    torch.testing.assert_close(logits(target).float(), logits(other))


def test_an_engine_leaves_its_target_as_it_is() -> None:
    target = random_target()
    own = kinds(target)
    Engine(target)
    assert kinds(target) == own


def test_commands_that_decode_merge_their_target_once() -> None:
    target = DEFAULTS.load_to_decode("embedded:draft_lm")
    first = target._trunk.blocks[0].self_attn.q_proj
    assert isinstance(first, MergedFirst)
    target.merge()
    assert target._trunk.blocks[0].self_attn.q_proj is first
    assert not isinstance(DEFAULTS.load("embedded:draft_lm")._trunk.blocks[0].self_attn.q_proj, MergedFirst)


def test_what_is_split_again_is_as_it_was() -> None:
    target = random_target()
    before, own = logits(target), kinds(target)
    assert merge(target._trunk.blocks) > 0
    split(target._trunk.blocks)
    assert kinds(target) == own
    assert torch.equal(logits(target), before)


def test_a_family_that_calls_its_matrices_in_another_way_is_left_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    target = random_target()
    before = logits(target)
    keys = type(target._trunk.blocks[0].self_attn)
    own = keys.forward

    def keys_first(self: nn.Module, hidden_states: torch.Tensor, *rest: object, **named: object) -> object:
        self.k_proj(hidden_states)
        return own(self, hidden_states, *rest, **named)

    monkeypatch.setattr(keys, "forward", keys_first)
    target.merge()
    assert not any(issubclass(own, (MergedFirst, MergedOther, MergedNorm)) for own in kinds(target))
    torch.testing.assert_close(logits(target), before)


def test_matrices_with_hooks_adapters_or_other_classes_stay() -> None:
    target = random_target()
    hooked, other = (block.self_attn for block in target._trunk.blocks[:2])
    hooked.q_proj.register_forward_hook(lambda *_: None)
    other.v_proj.__class__ = type("Adapted", (nn.Linear,), {})
    target.merge()
    assert type(hooked.k_proj) is nn.Linear
    assert type(other.q_proj) is nn.Linear


def test_no_states_stay_behind_a_forward() -> None:
    target = random_target()
    target.merge()
    Engine(target).generate(PROMPT, GenerationSettings(max_new_tokens=3))
    for block in target._trunk.blocks:
        outputs = [module.outputs for module in block.modules() if isinstance(module, MergedFirst)]
        assert outputs
        assert all(part is None for each in outputs for part in each.parts)
