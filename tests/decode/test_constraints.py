"""Settings of a model's generation config: each against Transformers' own replies, with trees, and every field accounted for."""

from __future__ import annotations

from dataclasses import fields, replace
from typing import Any

import pytest
import torch
from doubles import BOS, PlannedDrafter, random_target
from transformers import GenerationConfig

from draftsmith.decode import Engine, GenerationSettings, model_settings
from draftsmith.decode.constraints import Constraints
from draftsmith.decode.model_settings import OF_FLAGS, REFUSED, WITHOUT_EFFECT, constraints_of, for_target, honouring
from draftsmith.decode.processors import processors_of
from draftsmith.decode.verify.lossy_rules import Everything
from draftsmith.models import DraftLimits, ReDrafter, SampledChildren, Target

EOS = 2
PROMPTS = [[BOS, 5, 9, 11, 4], [BOS, 7], [BOS, 8, 8, 8, 30, 31, 32, 33, 34, 35, 36]]
BUDGET = 12
PLAIN = GenerationSettings(max_new_tokens=BUDGET, eos_token_ids=(EOS,))


@pytest.fixture(scope="module")
def target() -> Target:
    return random_target()


@pytest.fixture(scope="module")
def likely(target: Target) -> list[int]:
    """What the target says by itself to the first prompt: tokens that a constraint can take away."""
    return Engine(target).generate(PROMPTS[:1], PLAIN)[0].token_ids


def asked_for(likely: list[int]) -> dict[str, dict[str, Any]]:
    """A config a setting, each of which changes some reply."""
    return {
        "suppress": {"suppress_tokens": likely[:3]},
        "suppress at the beginning": {"begin_suppress_tokens": likely[:1]},
        "bad words": {"bad_words_ids": [likely[:1], likely[1:3]]},
        "biases": {"sequence_bias": [[likely[:1], -30.0], [likely[2:4], -40.0]]},
        "no n-gram twice": {"no_repeat_ngram_size": 1},
        "no n-gram of the prompt": {"encoder_no_repeat_ngram_size": 1, "sequence_bias": [[[8], 50.0]]},
        "prompt's tokens": {"encoder_repetition_penalty": 3.0},
        "least length": {"min_length": 14, "sequence_bias": [[[EOS], 30.0]]},
        "least new tokens": {"min_new_tokens": 5, "sequence_bias": [[[EOS], 30.0]]},
        "forced end": {"forced_eos_token_id": 17},
        "shorter and shorter": {"exponential_decay_length_penalty": (3, 4.0)},
        "no invalid values": {"remove_invalid_values": True, "suppress_tokens": likely[:2]},
        "watermark": {"watermarking_config": {"bias": 8.0, "seeding_scheme": "lefthash"}},
    }


@pytest.mark.parametrize("name", asked_for([3, 4, 5, 6]))
def test_greedy_replies_are_those_of_transformers_with_and_without_trees(
    target: Target, likely: list[int], name: str
) -> None:
    asked = asked_for(likely)[name]
    settings = honouring(PLAIN, GenerationConfig(**asked), "this model")
    expected = []
    for prompt in PROMPTS:
        config = GenerationConfig(do_sample=False, max_new_tokens=BUDGET, eos_token_id=EOS, pad_token_id=0, **asked)
        ids = torch.tensor([prompt])
        found = target.model.generate(ids, attention_mask=torch.ones_like(ids), generation_config=config)
        expected.append(found[0, len(prompt) :].tolist())
    assert [one.token_ids for one in Engine(target).generate(PROMPTS, settings)] == expected
    assert expected != [one.token_ids for one in Engine(target).generate(PROMPTS, PLAIN)]
    for manner in ("late", "random"):
        engine = Engine(target, PlannedDrafter(target, manner, width=2, depth=3), DraftLimits(2, 3))  # type: ignore[arg-type]
        assert [one.token_ids for one in engine.generate(PROMPTS, settings)] == expected


SAMPLING = {"typical_p": 0.4, "epsilon_cutoff": 0.02, "eta_cutoff": 0.05, "top_h": 0.5, "no_repeat_ngram_size": 2}


@pytest.mark.parametrize("field", SAMPLING)
def test_sampled_replies_are_the_same_with_trees_and_in_any_batch(target: Target, field: str) -> None:
    warm = replace(PLAIN, temperature=1.2, top_k=20, repetition_penalty=1.2, seed=3)
    settings = honouring(warm, GenerationConfig(**{field: SAMPLING[field]}), "this model")
    plain = [one.token_ids for one in Engine(target).generate(PROMPTS, settings)]
    engine = Engine(target, PlannedDrafter(target, "half", width=2, depth=3), DraftLimits(2, 3))
    assert [one.token_ids for one in engine.generate(PROMPTS, settings)] == plain
    assert engine.generate(PROMPTS[1:2], settings, request_ids=[1])[0].token_ids == plain[1]


def test_processors_come_in_the_order_of_transformers(target: Target) -> None:
    """Transformers' own list for the same config; its way to it is private, so that an order of another version is seen here."""
    asked = {
        **{name: value for one in asked_for([3, 4, 5, 6]).values() for name, value in one.items()},
        **SAMPLING,
        "forced_bos_token_id": 9,
    }
    values = {"temperature": 0.7, "top_k": 5, "top_p": 0.9, "min_p": 0.1, "repetition_penalty": 1.3}
    config = GenerationConfig(do_sample=True, max_length=BUDGET + 2, eos_token_id=EOS, **values, **asked)
    target.model._prepare_special_tokens(config, device="cpu")
    ids = torch.tensor([PROMPTS[1]])
    theirs = target.model._get_logits_processor(config, ids.shape[1], ids, device="cpu", model_kwargs={})
    ours = processors_of(honouring(replace(PLAIN, **values), config, "x"), PROMPTS[1], BUDGET, 61, torch.device("cpu"))
    assert [type(one) for one in ours] == [type(one) for one in theirs]


def test_a_lossy_rule_lets_no_forbidden_token_stand(target: Target, likely: list[int]) -> None:
    settings = honouring(PLAIN, GenerationConfig(suppress_tokens=likely), "this model")
    drafter = PlannedDrafter(target, "oracle", width=1, depth=4)
    engine = Engine(target, drafter, DraftLimits(1, 4), rule=Everything())
    replies = engine.generate(PROMPTS, settings)
    assert set(likely) & {token for one in engine.generate(PROMPTS, PLAIN) for token in one.token_ids}
    assert not set(likely) & {token for one in replies for token in one.token_ids}


def test_sampled_trees_emit_no_forbidden_token(target: Target) -> None:
    torch.manual_seed(5)
    drafter = ReDrafter.for_target(target.ends).eval()
    engine = Engine(target, drafter, DraftLimits(sampled=SampledChildren((3, 2))))
    warm = replace(PLAIN, temperature=1.0, top_k=4, seed=3)
    free = {token for one in engine.generate(PROMPTS, warm) for token in one.token_ids}
    forbidden = sorted(free)[::2]
    settings = honouring(warm, GenerationConfig(suppress_tokens=forbidden, min_new_tokens=BUDGET), "this model")
    replies = engine.generate(PROMPTS, settings)
    assert not set(forbidden) & {token for one in replies for token in one.token_ids}
    assert [len(one.token_ids) for one in replies] == [BUDGET] * len(PROMPTS)


# ---- every field ---------------------------------------------------------------------------------------------------


def test_every_field_of_transformers_is_accounted_for_once() -> None:
    """A version of Transformers with a new field fails here, until somebody says what becomes of it."""
    honoured = {field.name for field in fields(Constraints)} | {"stop_strings"}
    groups = [OF_FLAGS, WITHOUT_EFFECT, set(REFUSED), honoured]
    known = set().union(*groups)
    assert sum(map(len, groups)) == len(known)
    assert {name for name in vars(GenerationConfig()) if not name.startswith("_")} - known == set()


def test_a_config_that_asks_for_nothing_changes_nothing() -> None:
    neutral = GenerationConfig(**GenerationConfig._get_default_generation_params())
    assert honouring(PLAIN, neutral, "this model") == PLAIN
    assert honouring(PLAIN, None, "this model") == PLAIN


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("num_beams", 4),
        ("num_return_sequences", 2),
        ("guidance_scale", 1.5),
        ("penalty_alpha", 0.6),
        ("dola_layers", "high"),
        ("token_healing", True),
        ("max_time", 3.0),
        ("stop_strings", ["."]),
    ],
)
def test_what_cannot_be_honoured_is_refused_by_name(field: str, value: object) -> None:
    config = GenerationConfig()
    setattr(config, field, value)
    with pytest.raises(ValueError, match=rf"config of this model sets {field} to .*--generation_config none"):
        honouring(PLAIN, config, "this model")


def test_stop_strings_are_honoured_where_the_engine_tells_text() -> None:
    own = replace(PLAIN, stop_strings=("x",))
    both = honouring(own, GenerationConfig(stop_strings=["y", "x"]), "this model", tells_text=True)
    assert both.stop_strings == ("x", "y")


def test_a_field_that_a_later_transformers_adds_is_refused_until_it_is_known(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(model_settings, "WITHOUT_EFFECT", WITHOUT_EFFECT - {"low_memory"})
    config = GenerationConfig()
    config.low_memory = True
    with pytest.raises(ValueError, match="sets low_memory to True"):
        honouring(PLAIN, config, "this model")


def test_a_field_that_transformers_does_not_have_is_named_in_a_warning() -> None:
    with pytest.warns(UserWarning, match="'chat_format' that Transformers does not know"):
        assert honouring(PLAIN, GenerationConfig(chat_format="chatml"), "this model") == PLAIN


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("suppress_tokens", "12"),
        ("suppress_tokens", [1.5]),
        ("bad_words_ids", [3, 4]),
        ("bad_words_ids", [[]]),
        ("min_new_tokens", "4"),
        ("no_repeat_ngram_size", -1),
        ("sequence_bias", [[[1, 2]]]),
        ("exponential_decay_length_penalty", [3]),
        ("typical_p", 0.0),
        ("encoder_repetition_penalty", -2.0),
        ("remove_invalid_values", "yes"),
    ],
)
def test_a_value_that_is_none_for_its_field_is_named(field: str, value: object) -> None:
    config = GenerationConfig()
    setattr(config, field, value)
    with pytest.raises(ValueError, match=rf"sets {field} to .*which is no value for it"):
        constraints_of(config, "this model")


def test_a_loaded_target_is_honoured_until_it_forgets_its_settings(target: Target) -> None:
    other = random_target(seed=1)
    other.model.generation_config.suppress_tokens = [7]
    assert for_target(PLAIN, other).constraints == Constraints(suppress_tokens=(7,))
    other.forget_settings()
    assert for_target(PLAIN, other) == PLAIN
    assert other.eos_token_ids == target.eos_token_ids
