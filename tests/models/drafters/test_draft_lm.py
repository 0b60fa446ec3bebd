"""An ordinary causal LM as a drafter: lossless for every family, its cache right, its vocabulary and tokenizer watched."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path

import pytest
import torch
import transformers
from doubles import (
    BOS,
    VOCAB,
    draft,
    family_configs,
    first_cycle,
    greedy_by_hand,
    opening,
    random_model,
    random_target,
    served_logits,
)
from joint_law import chi_square_pvalue
from tiny import TEXTS, make_tokenizer, save_target

from draftsmith.decode import Engine, GenerationSettings
from draftsmith.models import (
    DraftLimits,
    LMDrafter,
    PackedBatch,
    Rollout,
    SampledChildren,
    Target,
    draft_lm,
    load_draft_lm,
    load_tokenizer,
    tokenizer_fingerprint,
)
from draftsmith.models.drafters.drafter_folder import load_drafter
from draftsmith.models.tree.limits import Rule
from draftsmith.models.trunk.merged import MergedFirst, MergedOther

PROMPTS = [[BOS, 5, 9, 11, 4], [BOS, 7], [BOS, 8, 8, 8, 30, 31, 32, 33, 34, 35, 36]]
SHAPES = {
    "chain": DraftLimits(1, 4),
    "beams": DraftLimits(3, 4),
    "dynamic": DraftLimits(3, 4, node_budget=9),
    "static": DraftLimits(paths=((0,), (1,), (0, 0), (0, 1), (1, 0), (0, 0, 0))),
}


@pytest.fixture(scope="module")
def target() -> Target:
    return random_target()


def nearly(target: Target, noise: float, seed: int = 1) -> Target:
    """The same model with noise on its weights: right now and then."""
    model = random_model(family_configs()["llama"])
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for own, other in zip(model.parameters(), target.model.parameters(), strict=True):
            own.copy_(other + torch.randn(other.shape, generator=generator) * noise)
    return Target.from_model(model, name="nearly")


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("family", sorted(family_configs()))
def test_greedy_equals_the_targets_own_and_the_target_itself_is_always_accepted(family: str, shape: str) -> None:
    """A wrong cache, mask, position or window of the drafter would lower what is accepted of its drafts.

    Chains and static trees hold the greedy continuation; beams and dynamic trees may prefer paths that are likelier as a whole.
    """
    target = random_target(family)
    expected = [greedy_by_hand(target, prompt, 17) for prompt in PROMPTS]
    limits = SHAPES[shape]
    request = GenerationSettings(max_new_tokens=17)
    for prompts in (PROMPTS, PROMPTS[2:]):
        results = Engine(target, LMDrafter(random_target(family)), limits).generate(prompts, request)
        assert [one.token_ids for one in results] == expected[-len(prompts) :]
        for one in results if shape in ("chain", "static") else []:
            *full, _ = one.accepted
            assert full == [limits.draft_length] * len(full)


@pytest.mark.parametrize("shape", SHAPES)
def test_greedy_equals_the_targets_own_with_an_lm_that_is_right_now_and_then(target: Target, shape: str) -> None:
    expected = [greedy_by_hand(target, prompt, 24) for prompt in PROMPTS]
    lm = nearly(target, noise=0.05)
    results = Engine(target, LMDrafter(lm), SHAPES[shape]).generate(PROMPTS, GenerationSettings(max_new_tokens=24))
    assert [one.token_ids for one in results] == expected
    lengths = {accepted for one in results for accepted in one.accepted}
    assert len(lengths) > 1


@pytest.mark.parametrize("family", ["llama", "mistral", "gemma3", "gpt2"])
def test_what_it_serves_is_what_the_model_says_of_the_whole_text(target: Target, family: str) -> None:
    lm = random_target(family, seed=4)
    text, steps = [BOS, 5, 6, 20, 21, 22, 23, 24, 5, 9, 10, 11], 5
    with torch.inference_mode():
        whole = lm.model(input_ids=torch.tensor([text]), use_cache=False).logits[0, -steps:]
    drafter = LMDrafter(lm)
    drafter.attach(target.ends)
    torch.testing.assert_close(served_logits(target, drafter, text, steps), whole, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", ["llama", "mistral", "gemma3", "gpt2"])
def test_every_node_of_a_tree_is_continued_as_its_own_path(target: Target, family: str) -> None:
    lm = random_target(family, seed=4)
    drafter = LMDrafter(lm)
    drafter.attach(target.ends)
    texts = [[BOS, 5, 6, 20, 21, 22, 23, 24, 5, 9], [BOS, 8, 7, 6, 5, 4, 3, 40, 41, 42]]
    start = opening(target, texts, DraftLimits(3, 3), ())
    paths = [[[7], [8], [9]], [[8, 30], [7, 31], [8, 32]], [[8, 32, 50], [8, 30, 51], [8, 32, 52]]]
    aboves = [[0, 0, 0], [1, 0, 1], [2, 0, 2]]
    with torch.inference_mode():
        expander = drafter.expander(drafter.start(start), first_cycle(start), DraftLimits(3, 3))
        expander.begin()
        for layer, above in zip(paths, aboves, strict=True):
            tokens = torch.tensor([[path[-1] for path in layer]] * 2)
            got = expander.extend(tokens, torch.tensor([above] * 2))
            for row, text in enumerate(texts):
                whole = torch.tensor([text + path for path in layer])
                expected = lm.model(input_ids=whole, use_cache=False).logits[:, -1]
                torch.testing.assert_close(got[row], expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", ["mistral", "gemma2"])
def test_a_tree_deeper_than_the_window_looks_back_no_further_than_the_model(target: Target, family: str) -> None:
    """Two nodes a layer, so that slots and positions part, over nine layers; the window is seven."""
    lm = random_target(family, seed=4)
    drafter = LMDrafter(lm)
    drafter.attach(target.ends)
    text = [BOS, 5, 6, 20]
    start = opening(target, [text], DraftLimits(2, 9), ())
    with torch.inference_mode():
        expander = drafter.expander(drafter.start(start), first_cycle(start), DraftLimits(2, 10))
        expander.begin()
        for depth in range(9):
            got = expander.extend(torch.tensor([[7 + depth, 30 + depth]]), torch.tensor([[0, min(depth, 1)]]))
        for place, first in enumerate((7, 30)):
            whole = torch.tensor([text + list(range(first, first + 9))])
            expected = lm.model(input_ids=whole, use_cache=False).logits[0, -1]
            torch.testing.assert_close(got[0, place], expected, rtol=1e-4, atol=1e-4)


def test_a_draft_is_the_lms_own_greedy_continuation(target: Target) -> None:
    lm = random_target("mistral", seed=4)
    drafter = LMDrafter(lm)
    drafter.attach(target.ends)
    text = [BOS, 5, 9, 11, 4, 30, 31, 32, 33, 34]
    tree = draft(target, drafter, [text], DraftLimits(1, 5))
    assert tree.tokens_BN[0, 1:].tolist() == greedy_by_hand(lm, text, 5)


def test_an_lm_that_only_decodes_is_merged_and_drafts_the_same(target: Target) -> None:
    apart, merged = LMDrafter(random_target(seed=4)), LMDrafter(random_target(seed=4))
    assert merged.to_decode(target.device) is merged
    kinds = {type(module) for module in merged.modules()}
    assert {MergedFirst, MergedOther} <= kinds
    assert MergedFirst not in {type(module) for module in apart.modules()}
    texts = [[BOS, 5, 9, 11, 4, 30, 31], [BOS, 7, 8, 9, 10, 11, 12]]
    trees = [draft(target, drafter.bound(target.ends), texts, DraftLimits(2, 4)) for drafter in (apart, merged)]
    assert torch.equal(trees[0].tokens_BN, trees[1].tokens_BN)


@pytest.mark.parametrize("size", [40, VOCAB + 3])
def test_vocabularies_may_differ_in_size(target: Target, size: int) -> None:
    """A smaller one is never fed what it lacks, a larger one never proposes what the target lacks."""
    config = transformers.LlamaConfig(**{**family_configs()["llama"].to_dict(), "vocab_size": size})
    model = random_model(config, seed=6)
    if size > VOCAB:
        with torch.no_grad():
            model.lm_head.weight[VOCAB:] *= 20.0
    drafter = LMDrafter(Target.from_model(model))
    expected = [greedy_by_hand(target, prompt, 12) for prompt in PROMPTS]
    assert max(map(max, expected)) >= 40
    results = Engine(target, drafter, DraftLimits(3, 3)).generate(PROMPTS, GenerationSettings(max_new_tokens=12))
    assert [one.token_ids for one in results] == expected
    tree = draft(target, drafter, [[BOS, 5, 59]], DraftLimits(6, 3))
    assert int(tree.tokens_BN.max()) < min(VOCAB, max(size, 60))
    sampled = DraftLimits(sampled=SampledChildren((3, 2)))
    request = GenerationSettings(max_new_tokens=12, temperature=1.0)
    assert all(len(one.token_ids) == 12 for one in Engine(target, drafter, sampled).generate(PROMPTS, request))


@pytest.mark.parametrize("rule", ["mcsd", "kseq"])
@pytest.mark.parametrize("children", [(1, 1, 1), (3, 2)])
def test_sampled_trees_of_the_target_itself_are_accepted_whole(
    target: Target, rule: Rule, children: tuple[int, ...]
) -> None:
    limits = DraftLimits(sampled=SampledChildren(children, rule))
    request = GenerationSettings(max_new_tokens=19, temperature=0.9, top_k=12, top_p=0.9, seed=4)
    for one in Engine(target, LMDrafter(random_target()), limits).generate(PROMPTS, request):
        *full, _ = one.accepted
        assert full == [len(children)] * len(full)


@pytest.mark.parametrize("rule", ["mcsd", "kseq"])
@pytest.mark.parametrize("children", [(1, 1, 1), (3, 2)])
def test_sampled_trees_keep_the_joint_law_of_three_tokens(
    target: Target, rule: Rule, children: tuple[int, ...]
) -> None:
    engine = Engine(target, LMDrafter(nearly(target, noise=0.15)), DraftLimits(sampled=SampledChildren(children, rule)))
    request = GenerationSettings(max_new_tokens=3, temperature=1.2, top_k=4, repetition_penalty=1.5, seed=21)
    assert chi_square_pvalue(engine, [BOS, 5, 9], request, num_draws=3000) > 1e-3


def test_texts_beyond_the_lms_context_are_decoded_all_the_same(target: Target) -> None:
    config = transformers.GPT2Config(
        vocab_size=VOCAB, n_embd=32, n_layer=1, n_head=4, n_positions=12, bos_token_id=1, eos_token_id=2
    )
    drafter = LMDrafter(Target.from_model(random_model(config)))
    for prompt in (PROMPTS[2], [BOS, *range(3, 20)]):
        expected = greedy_by_hand(target, prompt, 20)
        result = Engine(target, drafter, DraftLimits(2, 4)).generate([prompt], GenerationSettings(max_new_tokens=20))[0]
        assert result.token_ids == expected


def test_long_prompts_are_read_in_chunks(target: Target, monkeypatch: pytest.MonkeyPatch) -> None:
    """The last of the prompts takes three chunks of four; a chunk that went astray would be missed by the drafter."""
    monkeypatch.setattr(draft_lm, "read_chunks", partial(draft_lm.read_chunks, chunk=4))
    results = Engine(target, LMDrafter(random_target()), DraftLimits(1, 4)).generate(
        PROMPTS, GenerationSettings(max_new_tokens=16)
    )
    assert all(one.accepted == [4, 4, 4] for one in results)


def test_it_is_not_trained_from_states(target: Target) -> None:
    with pytest.raises(ValueError, match="train it as any language model on the target's replies"):
        LMDrafter(random_target()).teacher_forced(PackedBatch.__new__(PackedBatch), Rollout.__new__(Rollout))


def test_an_lm_with_another_tokenizer_is_refused(tmp_path: Path, target: Target) -> None:
    drafter = load_draft_lm(str(save_target(tmp_path / "lm")))
    own = make_tokenizer()
    assert drafter.config.tokenizer_fingerprint == tokenizer_fingerprint(own)
    big = Target.load(str(save_target(tmp_path / "target", seed=2)))
    engine = Engine(big, drafter, DraftLimits(1, 3), tokenizer=own)
    prompt = list(own(TEXTS[0])["input_ids"])
    expected = greedy_by_hand(big, prompt, 8)
    assert engine.generate([prompt], GenerationSettings(max_new_tokens=8))[0].token_ids == expected
    own.add_tokens(["<|new|>"])
    with pytest.raises(ValueError, match=r"has another tokenizer .* use an LM of the target's own model family"):
        Engine(big, drafter, tokenizer=own)


def test_a_drafters_folder_may_be_a_causal_lms(tmp_path: Path) -> None:
    drafter = load_drafter(save_target(tmp_path / "lm"))
    assert isinstance(drafter, LMDrafter)
    assert not drafter.training
    assert drafter.lm.dtype == torch.float32
    embedded = load_drafter(Path("embedded:draft_lm"), "bfloat16")
    assert isinstance(embedded, LMDrafter)
    assert embedded.lm.dtype == torch.bfloat16
    embedded.check_tokenizer(tokenizer_fingerprint(load_tokenizer("embedded:target")))


def test_a_head_that_goes_by_a_language_models_config_is_no_draft_lm(tmp_path: Path) -> None:
    """Exported heads do, and would be filled up with random layers."""
    config = json.loads((save_target(tmp_path) / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"architectures": ["LlamaForCausalLMEagle"]}))
    with pytest.raises(
        ValueError, match=r"is an EAGLE by its config.json.*lacks fc.weight and holds the tensors lm_head.weight"
    ):
        load_drafter(tmp_path)


def test_an_adapter_loads_with_the_base_it_names(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    base = save_target(tmp_path / "base")
    model = transformers.AutoModelForCausalLM.from_pretrained(base)
    torch.manual_seed(0)
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
    adapted.save_pretrained(tmp_path / "adapter")
    ids = torch.tensor([[5, 6, 7]])
    with torch.inference_mode():
        expected = adapted(input_ids=ids).logits
    for drafter in (
        load_draft_lm(str(tmp_path / "adapter")),
        load_draft_lm(str(base), adapter=str(tmp_path / "adapter")),
    ):
        got = drafter.lm.model(input_ids=ids).logits
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)
        assert drafter.config.tokenizer_fingerprint == tokenizer_fingerprint(load_tokenizer(str(base)))
    with pytest.raises(ValueError, match="is an adapter itself"):
        load_draft_lm(str(tmp_path / "adapter"), adapter=str(tmp_path / "adapter"))
    (tmp_path / "adapter" / "adapter_config.json").write_text("{}")
    with pytest.raises(ValueError, match="names no base model"):
        load_draft_lm(str(tmp_path / "adapter"))
