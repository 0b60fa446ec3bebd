"""Bytes against counts by hand: hidden size 8, intermediate size 16, 2 layers, vocabulary 40, float32 unless a test says otherwise."""

import pytest
import torch
from parallel_heads import ParallelHeadsFamily
from peft import LoraConfig, inject_adapter_in_model
from torch import Tensor, nn
from transformers import (
    DeepseekV3Config,
    DeepseekV3ForCausalLM,
    DynamicCache,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
)

from draftsmith.evaluate.roofline.bytes_read import (
    WeightBytes,
    cached_bytes,
    count_weights,
    draft_bytes,
    target_weights,
    tensor_bytes,
)
from draftsmith.models.composed.phrase_drafter import PhraseConfig, PhraseDrafter
from draftsmith.models.composed.refined_drafter import RefinedConfig, RefinedDrafter
from draftsmith.models.composed.revisers import LMReviser, NgramReviser
from draftsmith.models.composed.suffix_drafter import SuffixConfig, SuffixDrafter
from draftsmith.models.drafters.draft_lm import LMDrafter
from draftsmith.models.families.eagle import Eagle
from draftsmith.models.families.eagle3 import Eagle3
from draftsmith.models.families.redrafter import ReDrafter
from draftsmith.models.ngrams.kneser_ney import kneser_ney
from draftsmith.models.target.key_values import KeyValues, key_values_of
from draftsmith.models.target.target import Target
from draftsmith.models.tree.shapes import parse_shape

D, INNER, V, LAYERS = 8, 16, 40, 2
SIZES = {
    "hidden_size": D,
    "intermediate_size": INNER,
    "num_hidden_layers": LAYERS,
    "vocab_size": V,
    "max_position_embeddings": 64,
}
HEADS = {"num_attention_heads": 2, "num_key_value_heads": 1}
ATTENTION = D * D + 2 * D * 4 + D * D  # 2 heads of 4; the one key/value head has D x 4
LAYER = ATTENTION + 3 * D * INNER + 2 * D
TRUNK = LAYERS * LAYER + D


def llama(**changes: object) -> Target:
    config = LlamaConfig(**(SIZES | HEADS | changes))
    return Target.from_model(LlamaForCausalLM(config))


@pytest.fixture(scope="module")
def target() -> Target:
    return llama(tie_word_embeddings=False)


def test_a_dense_target_reads_its_layers_and_head_whole_and_one_row_of_its_table(target: Target) -> None:
    weights = target_weights(target)
    assert weights == WeightBytes(whole=4 * (TRUNK + V * D), row=4 * D)
    assert weights.read_by(1) == 4 * (TRUNK + V * D + D)
    assert weights.read_by(5) == 4 * (TRUNK + V * D + 5 * D)


def test_a_tied_head_is_read_once_a_step() -> None:
    assert target_weights(llama(tie_word_embeddings=True)) == WeightBytes(whole=4 * (TRUNK + V * D))


def test_narrow_weights_count_as_they_lie_in_memory() -> None:
    model = LlamaForCausalLM(LlamaConfig(**SIZES, **HEADS))
    weights = target_weights(Target.from_model(model.to(torch.bfloat16)))
    assert weights.whole == 2 * (TRUNK + V * D)


class EightBitLinear(nn.Module):
    """Stores weights and scales as quantisers do: buffers of int8, and scales beside them."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("weight", torch.zeros(16, 8, dtype=torch.int8))
        self.register_buffer("scales", torch.zeros(16))


def test_quantised_weights_count_with_their_scales() -> None:
    assert count_weights((EightBitLinear(),), ()).whole == 16 * 8 + 4 * 16


class PackedTensor(torch.Tensor):
    """A tensor of others, as torchao's quantised weights are."""

    packed: Tensor
    scales: Tensor

    def __tensor_flatten__(self) -> tuple[list[str], None]:
        return ["packed", "scales"], None


def test_a_tensor_that_holds_others_counts_as_these() -> None:
    weight = torch.zeros(16, 8).as_subclass(PackedTensor)
    weight.packed, weight.scales = torch.zeros(16, 4, dtype=torch.uint8), torch.zeros(16)
    assert tensor_bytes(weight) == 16 * 4 + 4 * 16


def test_an_adapter_that_is_not_merged_is_read_beside_the_weights() -> None:
    model = LlamaForCausalLM(LlamaConfig(**SIZES, **HEADS))
    inject_adapter_in_model(LoraConfig(r=2, target_modules=["q_proj"]), model)
    weights = target_weights(Target.from_model(model))
    assert weights.whole == 4 * (TRUNK + V * D + LAYERS * 2 * (D + D))


@pytest.fixture(scope="module")
def mixture() -> Target:
    return Target.from_model(
        MixtralForCausalLM(MixtralConfig(**SIZES, **HEADS, num_local_experts=8, num_experts_per_tok=2))
    )


def test_a_token_reads_the_experts_that_it_needs_and_several_at_most_all(mixture: Target) -> None:
    weights = target_weights(mixture)
    expert = 4 * LAYERS * 3 * D * INNER
    assert (weights.experts, weights.share) == (8 * expert, 0.25)
    assert weights.whole == 4 * (LAYERS * (ATTENTION + 8 * D + 2 * D) + D + V * D)
    assert weights.read_by(1) - weights.whole - weights.row == 2 * expert
    assert weights.read_by(3) - weights.whole - 3 * weights.row == 6 * expert
    assert weights.read_by(9) - weights.whole - 9 * weights.row == 8 * expert


def test_what_several_tokens_read_of_experts_is_called_an_upper_bound(mixture: Target, target: Target) -> None:
    assert not target_weights(mixture).is_upper_bound(1)
    assert target_weights(mixture).is_upper_bound(2)
    assert WeightBytes(whole=1, experts=8).is_upper_bound(
        1
    )  # a config that does not say how many experts a token needs
    assert not target_weights(target).is_upper_bound(64)


def test_keys_and_values_follow_the_groups_and_not_the_heads(target: Target) -> None:
    assert key_values_of(target) == (KeyValues(2 * 1 * 4 * 4),) * LAYERS
    assert cached_bytes(key_values_of(target), 10) == LAYERS * 32 * 10
    assert cached_bytes(key_values_of(target), 10, num_rows=3) == LAYERS * 32 * 10 * 3


def test_a_layer_with_a_window_reads_no_more_than_its_window() -> None:
    kinds = ["sliding_attention", "full_attention"]
    attention = {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 4, "sliding_window": 6}
    config = Gemma3TextConfig(**SIZES, **attention, layer_types=kinds)
    layers = key_values_of(Target.from_model(Gemma3ForCausalLM(config)))
    assert layers == (KeyValues(32, window=6), KeyValues(32))
    assert cached_bytes(layers, 10) == 32 * (6 + 10)
    assert cached_bytes(layers, 5) == 32 * (5 + 5)


def test_keys_and_values_of_a_model_that_keeps_them_compressed_are_as_many_as_transformers_keeps() -> None:
    heads = {
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "qk_rope_head_dim": 4,
        "v_head_dim": 4,
        "qk_nope_head_dim": 4,
    }
    config = DeepseekV3Config(**SIZES, **heads, q_lora_rank=4, kv_lora_rank=4, first_k_dense_replace=LAYERS)
    model = DeepseekV3ForCausalLM(config)
    cache = DynamicCache()
    model.eval()(input_ids=torch.ones(1, 3, dtype=torch.int64), past_key_values=cache, use_cache=True)
    kept = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
    assert cached_bytes(key_values_of(Target.from_model(model)), 3) == kept


def test_redrafter_reads_the_contexts_projection_once_and_the_rest_at_every_step(target: Target) -> None:
    draft = draft_bytes(ReDrafter.for_target(target.ends), parse_shape("4x5n15"))
    assert draft.once == 4 * (D * D + D)
    step = 2 * (D * D + D) + D * D + (D * D + D) + D * D + V * D
    assert draft.steps == (4 * step,) * 5
    assert draft.total == 4 * (D * D + D + 5 * step)
    assert draft.cached == 0


def test_redrafter_as_wide_as_apples_has_nothing_to_read_once(target: Target) -> None:
    draft = draft_bytes(ReDrafter.for_target(target.ends, exit_dim=2 * D), parse_shape("1x2"))
    blocks = 2 * ((2 * D) ** 2 + 2 * D)
    assert (draft.once, draft.steps) == (0, (4 * (blocks + D * D + D + D * D + 2 * D * V),) * 2)


def test_a_draft_vocabulary_narrows_the_head_of_each_step(target: Target) -> None:
    ids = torch.arange(0, V, 4)
    for kind in (ReDrafter, Eagle, Eagle3):
        layers = {"layers": ["layer.0.output", "layer.1.output"]} if kind is Eagle3 else {}
        whole = draft_bytes(kind.for_target(target.ends, **layers), parse_shape("1x3"))
        narrow = draft_bytes(kind.for_target(target.ends, draft_token_ids=ids, **layers), parse_shape("1x3"))
        assert whole.steps[0] - narrow.steps[0] == 4 * (V - len(ids)) * D, kind


def test_eagle_reads_the_targets_head_and_its_own_keys_at_every_step(target: Target) -> None:
    draft = draft_bytes(Eagle.for_target(target.ends), parse_shape("10x6n60"), context=10)
    own = sum(weight.numel() for weight in Eagle.for_target(target.ends).parameters())
    assert draft.steps == (4 * (own + V * D),) * 6
    assert draft.cached == 2 * 4 * 4 * 10
    assert draft.total == 6 * (4 * (own + V * D) + 320)


def test_eagle3_joins_the_targets_states_once(target: Target) -> None:
    drafter = Eagle3.for_target(target.ends, layers=["layer.0.output", "layer.1.output"])
    draft = draft_bytes(drafter, parse_shape("1x4"))
    own = sum(weight.numel() for weight in drafter.parameters())
    assert draft.once == 4 * 2 * D * D
    assert draft.steps == (4 * (own - 2 * D * D),) * 4


def test_a_head_for_each_step_is_read_by_its_step_alone(target: Target) -> None:
    drafter = ParallelHeadsFamily().build(target.ends, None, 4, "")
    own = sum(weight.numel() for weight in drafter.parameters())
    draft = draft_bytes(drafter, parse_shape("1x3"))
    assert draft.total == 4 * own // 4 * 3


def test_a_draft_lm_reads_its_own_weights_and_cache_at_every_step(target: Target) -> None:
    drafter = LMDrafter(llama(num_hidden_layers=1)).attach(target.ends)
    draft = draft_bytes(drafter, parse_shape("2x3"), context=10, num_rows=2)
    assert draft.steps == (target_weights(drafter.lm).read_by(4),) * 3
    assert draft.cached == 2 * 4 * 4 * 10 * 2


def test_a_drafter_made_of_others_reads_what_these_read(target: Target) -> None:
    head, shape = Eagle.for_target(target.ends), parse_shape("1x3")
    vocab_size = target.ends.vocab_size
    alone = draft_bytes(head, shape, context=10)
    table = kneser_ney([[1, 2, 3]], vocab_size, 2)
    refined = RefinedDrafter(
        RefinedConfig(head="head", ngrams="table", alpha=0.5, vocab_size=vocab_size), head, NgramReviser(table)
    )
    assert draft_bytes(refined, shape, context=10).total == alone.total
    lm = LMDrafter(llama(num_hidden_layers=1)).attach(target.ends)
    by_lm = RefinedDrafter(RefinedConfig(head="head", lm="lm", alpha=0.5, vocab_size=vocab_size), head, LMReviser(lm))
    assert draft_bytes(by_lm, shape, context=10).total == alone.total + draft_bytes(lm, shape, context=10).total
    assert draft_bytes(SuffixDrafter(SuffixConfig()), shape).total == 0
    assert draft_bytes(SuffixDrafter(SuffixConfig(), head), shape, context=10).total == alone.total
    phrases = PhraseDrafter(PhraseConfig(phrase_length=4), head)
    assert draft_bytes(phrases, parse_shape("1x7"), context=10).total == alone.total, "phrases of 4 tokens read nothing"
