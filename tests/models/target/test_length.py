"""Targets whose attention changes with length: exact past every length, whatever the batch, or refused by name."""

from __future__ import annotations

import copy
from collections.abc import Sequence

import pytest
import torch
import transformers
from doubles import VOCAB, PlannedDrafter, random_model

from draftsmith.data.cache.features import features, prompt_lengths
from draftsmith.data.chats.tokenized_samples import TokenizedSample
from draftsmith.data.shards.manifest import CacheIdentity
from draftsmith.decode.engine import Engine
from draftsmith.decode.sampling import GenerationSettings
from draftsmith.models import PRE_NORM, DraftLimits, Target
from draftsmith.models.tree.limits import SampledChildren
from draftsmith.models.trunk.shrink import shrunk
from draftsmith.models.trunk.trunk import Trunk, mask_styles

t = transformers
ORIGINAL, NEW = 20, 12
SIZES = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 96,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "short_factor": [1.0] * 4,
    "long_factor": [1.0, 2.0, 4.0, 8.0],
    "original_max_position_embeddings": ORIGINAL,
}


class PastContext(Target):
    """A target that is decoded beyond its original context, where dynamic factors change."""

    @property
    def max_positions(self) -> int | None:
        return 96


def by_length(kind: str) -> transformers.PreTrainedModel:
    """A model whose rotary factors change at ORIGINAL tokens."""
    configs = {
        "phi3": lambda: t.Phi3Config(**SIZES, original_max_position_embeddings=ORIGINAL, rope_parameters=dict(LONGROPE)),
        "phimoe": lambda: t.PhimoeConfig(
            **SIZES, num_local_experts=2, rope_parameters=LONGROPE | {"short_mscale": 1.1, "long_mscale": 1.3}
        ),
        "llama-longrope": lambda: t.LlamaConfig(**SIZES, rope_parameters=LONGROPE | {"factor": 4.0}),
        "llama-dynamic": lambda: t.LlamaConfig(
            **SIZES | {"max_position_embeddings": ORIGINAL},
            rope_parameters={"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 4.0},
        ),
    }  # fmt: skip
    return random_model(configs[kind]())


def prompts(lengths: Sequence[int]) -> list[list[int]]:
    generator = torch.Generator().manual_seed(5)
    return [torch.randint(3, VOCAB, (length,), generator=generator).tolist() for length in lengths]


@torch.inference_mode()
def own_reply(model: transformers.PreTrainedModel, prompt: list[int]) -> list[int]:
    """What transformers generates, with a model that has read nothing before."""
    model, text = copy.deepcopy(model), list(prompt)
    if model.config.model_type in ("phi3", "phimoe"):
        # Its generation reads all again past the boundary (some releases of transformers lose the text there): as whole forwards do.
        for _ in range(NEW):
            text.append(int(model(torch.tensor([text]), use_cache=False).logits[0, -1].argmax()))
        return text[len(prompt) :]
    ids = torch.tensor([prompt])
    settings = {"do_sample": False, "max_new_tokens": NEW, "eos_token_id": None, "pad_token_id": 0}
    return model.generate(ids, attention_mask=torch.ones_like(ids), **settings)[0, len(prompt) :].tolist()


@pytest.mark.parametrize("kind", ["phi3", "phimoe", "llama-longrope", "llama-dynamic"])
def test_replies_across_the_original_context_are_transformers_own_in_batches_chunks_and_trees(kind: str) -> None:
    model = by_length(kind)
    target = PastContext.from_model(model)
    # Far before the boundary, the last prompts that are short, the first that is long, and a long one.
    texts = prompts([4, ORIGINAL - 1, ORIGINAL, ORIGINAL + 1, 30])
    expected = [own_reply(model, text) for text in texts]
    settings = GenerationSettings(max_new_tokens=NEW)
    drafter = PlannedDrafter(target, "late", width=3, depth=4)
    engines = {
        "a batch, prompts in chunks": Engine(target, prefill_chunk=7),
        "trees": Engine(target, drafter, DraftLimits(beam_width=3, draft_length=4)),
    }
    for name, engine in engines.items():
        assert [reply.token_ids for reply in engine.generate(texts, settings)] == expected, name
    assert Engine(target).generate(texts[:1], settings)[0].token_ids == expected[0], "a row alone"


def test_a_sampled_tree_ends_where_its_nodes_would_have_other_factors() -> None:
    from draftsmith.models.drafters.draft_lm import LMDrafter

    target = PastContext.from_model(by_length("phi3"))
    # The target drafts for itself: every candidate would be accepted but for the boundary.
    limits = DraftLimits(sampled=SampledChildren((1, 1, 1)))
    settings = GenerationSettings(max_new_tokens=NEW, temperature=1.0)
    reply = Engine(target, LMDrafter(target), limits).generate(prompts([ORIGINAL - 2]), settings)[0]
    assert len(reply.token_ids) == NEW
    assert reply.accepted[0] == 1  # of three: the third would stand behind the boundary


@pytest.mark.parametrize("kind", ["phi3", "llama-longrope"])
def test_states_that_are_extracted_are_those_of_decoding_whatever_else_is_in_the_forward(kind: str) -> None:
    target = Target.from_model(by_length(kind))
    texts = prompts([8, ORIGINAL + 9])
    samples = [
        TokenizedSample(str(len(ids)), ids, [place >= start for place in range(len(ids))])
        for ids, start in zip(texts, (3, 5), strict=True)
    ]

    identity = CacheIdentity(
        "t", None, "f", "k", "c", (PRE_NORM,), 32, "float32", "float32", "s", None, "m", 99, 2, 1.0, 1000
    )

    def extracted(chosen: list[TokenizedSample]) -> torch.Tensor:
        return features(target, chosen, identity).hidden[PRE_NORM]

    together, alone = extracted(samples), torch.cat([extracted([sample]) for sample in samples])
    torch.testing.assert_close(together, alone)
    # The last token of the long sample was read, as in decoding, when the text had grown past the boundary.
    reference = target.model.model(torch.tensor([texts[1]]), use_cache=False).last_hidden_state[0, -1]
    if kind == "phi3":
        torch.testing.assert_close(target.ends.final_norm(together[-1]), reference, rtol=1e-4, atol=1e-4)


def test_the_prompt_of_a_sample_ends_before_its_first_label() -> None:
    assert prompt_lengths([[False, True, True], [False] * 4], torch.device("cpu")).tolist() == [1, 4]


def unmasked(kind: str) -> transformers.PreTrainedConfig:
    """A config of a family whose attention no mask can follow."""
    if kind == "gpt-neo":
        types = [[["global", "local"], 1]]
        return t.GPTNeoConfig(
            vocab_size=VOCAB, hidden_size=32, num_layers=2, num_heads=4, attention_types=types, window_size=7
        )
    if kind == "doge":
        return t.DogeConfig(**SIZES, keep_window_size=64)
    heads = SIZES | {"num_key_value_heads": 4}
    return t.GlmMoeDsaConfig(**heads, n_routed_experts=4, qk_rope_head_dim=8, moe_intermediate_size=16)


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        ("gpt-neo", "GPTNeo.*window of its local attention in mask buffers"),
        ("doge", "Doge.*keep_window_size"),
        ("glm-dsa", "selects keys by an index"),
    ],
)
def test_attention_that_masks_cannot_follow_is_refused_by_name(kind: str, reason: str) -> None:
    model = t.AutoModelForCausalLM.from_config(unmasked(kind))
    with pytest.raises(ValueError, match=reason):
        Target.from_model(model)


def test_attention_that_hides_what_a_mask_shows_is_found_by_the_proof_though_six_tokens_show_nothing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A family that nobody knows of: it forgets keys that are farther than a number of its config, whatever the mask."""
    attention = t.models.llama.modeling_llama.LlamaAttention
    plain = attention.forward

    def forgetful(self, hidden_states, position_embeddings=None, attention_mask=None, **kwargs):  # type: ignore[no-untyped-def]
        reach = self.config.local_size_window
        if attention_mask is not None and attention_mask.shape[-1] > reach:
            attention_mask = attention_mask.clone()
            attention_mask[..., : attention_mask.shape[-1] - reach] = False
        return plain(self, hidden_states, position_embeddings, attention_mask, **kwargs)

    monkeypatch.setattr(attention, "forward", forgetful)
    config = t.LlamaConfig(**SIZES, local_size_window=4096)
    with pytest.raises(ValueError, match="past its lengths its states are others"):
        Target.from_model(random_model(config))


def test_the_proof_leaves_random_numbers_and_the_model_as_they_were() -> None:
    model = by_length("phi3")
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    torch.manual_seed(3)
    expected = torch.rand(1)
    torch.manual_seed(3)
    Target.from_model(model)
    assert torch.equal(torch.rand(1), expected)
    for name, buffer in model.named_buffers():
        assert torch.equal(buffer, before[name]), name


def test_a_tiny_copy_keeps_a_layer_of_each_kind_and_shortens_every_length() -> None:
    large = t.Gemma3TextConfig(sliding_window=4096)
    tiny = shrunk(large)
    assert set(tiny.layer_types) == set(large.layer_types)
    assert (tiny.sliding_window, tiny.max_position_embeddings) == (7, 64)
    assert tiny.hidden_size == tiny.num_attention_heads * tiny.head_dim
    factors = {"short_factor": [1.0] * 48, "long_factor": [2.0] * 48, "original_max_position_embeddings": 4096}
    long = shrunk(t.Phi3Config(original_max_position_embeddings=4096, rope_parameters=LONGROPE | factors))
    assert long.rope_parameters["original_max_position_embeddings"] == 16
    assert len(long.rope_parameters["long_factor"]) == long.hidden_size // long.num_attention_heads // 2


@pytest.mark.parametrize(
    "config",
    [t.MistralConfig(**SIZES, sliding_window=20), t.GPT2Config(vocab_size=VOCAB, n_embd=32, n_layer=1, n_head=4, n_positions=24)],
    ids=["a window longer than the proof's", "a table of positions shorter than the proof's texts"],
)  # fmt: skip
def test_lengths_of_the_proof_are_not_put_upon_the_model(config: transformers.PreTrainedConfig) -> None:
    model = random_model(config)
    target = Target.from_model(model)
    assert target.window == getattr(config, "sliding_window", None)
    (prompt,) = prompts([12])
    reply = Engine(target).generate([prompt], GenerationSettings(max_new_tokens=NEW))[0]
    assert reply.token_ids == own_reply(model, prompt)


def test_a_row_of_a_padded_forward_takes_factors_by_its_own_length() -> None:
    model = by_length("llama-longrope")
    trunk = Trunk(model.model, model.config, mask_styles(model.config)[0], "tiny")
    short, long = (torch.tensor(ids) for ids in prompts([9, ORIGINAL + 5]))
    padded = torch.nn.utils.rnn.pad_sequence([short, long], batch_first=True)
    together = trunk.prefix(padded, read=torch.tensor([9, ORIGINAL + 5])).normed
    torch.testing.assert_close(together[0, :9], trunk.prefix(short[None]).normed[0])
    torch.testing.assert_close(together[1], trunk.prefix(long[None]).normed[0])
