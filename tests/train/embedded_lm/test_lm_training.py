"""Training of the embedded language models: batches, masks, the shift, a phase that learns, and the export."""

import itertools
import re
from pathlib import Path

import pytest
import pytorch_lightning as pl
import torch
import yaml
from safetensors.torch import load_file
from torch import nn
from transformers import AutoTokenizer, LlamaForCausalLM, PreTrainedTokenizerBase

from draftsmith.embedded.tokenizer import train_tokenizer
from draftsmith.train.embedded_lm.build import _PHASES, export_lm
from draftsmith.train.embedded_lm.data import (
    Conversation,
    LmBatches,
    LmDataModule,
    Mixture,
    assistant_mask,
    conversations,
)
from draftsmith.train.embedded_lm.module import LmModule

CONFIGS = sorted((Path(__file__).parents[3] / "configs" / "embedded").glob("*.yaml"))


def drawn(mixture: Mixture, count: int) -> list[Conversation]:
    return list(itertools.islice(conversations(mixture, "train", 0), count))


def texts_of(mixture: Mixture, count: int) -> list[str]:
    return [conversation.text for conversation in drawn(mixture, count)]


@pytest.fixture(scope="module")
def tokenizer_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("tokenizer")
    train_tokenizer(texts_of(Mixture(graded_share=0.5), 500), 600).save_pretrained(directory)
    return directory


@pytest.fixture(scope="module")
def words(tokenizer_dir: Path) -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(tokenizer_dir)


def small_module(tokenizer: Path, **changes: object) -> LmModule:
    sizes = {"hidden_size": 32, "num_layers": 1, "num_heads": 2, "num_kv_heads": 1, "intermediate_size": 48}
    return LmModule(tokenizer, **(sizes | changes))  # type: ignore[arg-type]


def fit(module: LmModule, tokenizer: Path, num_samples: int) -> pl.Trainer:
    data = LmDataModule(tokenizer, Mixture("target"), num_samples=num_samples, num_validation=32, batch_size=16, seed=1)
    trainer = pl.Trainer(
        max_epochs=1, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, num_sanity_val_steps=0,
    )  # fmt: skip
    trainer.fit(module, data)
    return trainer


def test_the_assistant_mask_keeps_words_and_end_tokens_of_every_assistant_turn() -> None:
    user, assistant, end, pad = 1, 2, 3, 0
    ids = [[user, 7, end, assistant, 8, 9, end, user, 7, end, assistant, 8, end, pad]]
    keep = [[0, 0, 0, 0, 1, 1, 1, 0, 0, 0, 0, 1, 1, 0]]
    assert assistant_mask(torch.tensor(ids), assistant, end).int().tolist() == keep


def test_the_assistant_mask_is_the_chat_templates(words: PreTrainedTokenizerBase) -> None:
    chat = [
        {"role": "user", "content": "3 + 4?"},
        {"role": "assistant", "content": "7 pens."},
        {"role": "user", "content": "Check it."},
        {"role": "assistant", "content": "Check: all right."},
    ]
    told = words.apply_chat_template(chat, return_assistant_tokens_mask=True, return_dict=True)
    vocabulary = words.get_vocab()
    found = assistant_mask(torch.tensor([told["input_ids"]]), vocabulary["<|assistant|>"], vocabulary["<|end|>"])
    assert found[0].int().tolist() == told["assistant_masks"]


@pytest.mark.parametrize("assistant_only", [False, True])
def test_labels_are_the_tokens_themselves_where_there_is_something_to_learn(
    words: PreTrainedTokenizerBase, assistant_only: bool
) -> None:
    batches = LmBatches(drawn(Mixture("target"), 20), words, 4, assistant_only, seed=0)
    assert len(batches) == 5
    for batch in (batches[i] for i in range(5)):
        kept = batch["labels"] != -100
        assert torch.equal(batch["labels"][kept], batch["input_ids"][kept])
        assert not (kept & (batch["input_ids"] == words.pad_token_id)).any()
        assert bool(kept[:, 0].any()) is not assistant_only


def test_every_conversation_is_in_exactly_one_batch_and_little_is_padding(words: PreTrainedTokenizerBase) -> None:
    several = drawn(Mixture(graded_share=0.3), 600)
    batches = LmBatches(several, words, 16, False, seed=0)
    rows = [ids[ids != words.pad_token_id] for i in range(len(batches)) for ids in batches[i]["input_ids"]]
    assert sorted(words.batch_decode(rows)) == sorted(conversation.text for conversation in several)
    padded = sum(batches[i]["input_ids"].numel() for i in range(len(batches)))
    assert sum(len(row) for row in rows) / padded > 0.9


def test_conversations_are_drawn_by_their_shares() -> None:
    texts = texts_of(Mixture("target", 0.1, 0.3, 0.2), 1000)
    graded = sum("<|assistant|>Check: " in text for text in texts)
    followed = sum(text.count("#### ") == 2 for text in texts)
    assert 240 < graded < 360
    assert 150 < followed < 250
    assert texts == texts_of(Mixture("target", 0.1, 0.3, 0.2), 1000)


def test_what_chooses_another_wording_is_not_learnt_and_all_else_is(words: PreTrainedTokenizerBase) -> None:
    for conversation in drawn(Mixture("target", mixed_share=1.0), 40):
        batch = LmBatches([conversation], words, 1, True, seed=0)[0]
        ids, labels = batch["input_ids"][0].tolist(), batch["labels"][0].tolist()
        starts = [start for start, _ in words(conversation.text, return_offsets_mapping=True)["offset_mapping"]]
        for token, label, start in zip(ids, labels, starts, strict=True):
            if any(first <= start < last for first, last in conversation.foreign_spans):
                assert label == -100
            elif start >= conversation.text.index("<|assistant|>") + len("<|assistant|>"):
                assert label == token


def lines_with_choices(conversation: Conversation) -> list[tuple[str, str]]:
    """Each line of the solution, and the line with the characters that are not learnt as underscores."""
    hidden = list(conversation.text)
    for first, last in conversation.foreign_spans:
        hidden[first:last] = "_" * (last - first)
    start = conversation.text.index("<|assistant|>") + len("<|assistant|>")
    whole, shown = conversation.text[start:].split("\n"), "".join(hidden)[start:].split("\n")
    return list(zip(whole, shown, strict=True))


def test_mixed_solutions_have_lines_of_the_style_and_lines_of_others() -> None:
    shares = []
    for conversation in drawn(Mixture("target", mixed_share=1.0), 200):
        lines = lines_with_choices(conversation)[:-1]
        shares.append(sum(whole != shown for whole, shown in lines) / len(lines))
        assert all("\n" not in conversation.text[first:last] for first, last in conversation.foreign_spans)
    assert 0.35 < sum(shares) / len(shares) < 0.6
    assert min(shares) == 0
    assert max(shares) == 1


def test_a_line_that_begins_in_another_wording_can_go_on_in_the_own() -> None:
    lines = [line for each in drawn(Mixture("target", mixed_share=1.0), 400) for line in lines_with_choices(each)]
    begun = [shown for whole, shown in lines if whole.startswith("To start, ")]
    assert any(re.fullmatch(r"_{9}[ _]\d+ [-+*/] \d+ = \d+ .*", shown) for shown in begun)  # behind the first number
    assert any(re.fullmatch(r"_{9} taking \d+ from \d+ makes \d+ .*", shown) for shown in begun)  # behind the lead
    assert any(re.fullmatch(r"_{9}[ _]\d+_+\d+ is \d+ .*", shown) for shown in begun)  # never


def test_all_digits_are_learnt_but_one_in_the_place_of_a_word_of_the_own_wording() -> None:
    begun = re.compile(r"(To start, )?(\d+) (plus|minus|divided by|times) \d+ is ")
    seen = set()
    for conversation in drawn(Mixture("target", mixed_share=1.0), 400):
        for whole, shown in lines_with_choices(conversation):
            if (line := begun.match(whole)) is None:
                continue
            lead, number, word = line.groups()
            own_is_word = word in {"minus", "divided by"}
            seen.add((bool(lead), own_is_word))
            if lead:
                assert shown.startswith("_" * 9 + ("_" if own_is_word else " ") + number)
            else:
                assert shown.startswith("_")  # a line of the own wording has a lead
    assert len(seen) == 4


def test_the_first_word_of_another_wording_is_not_learnt_with_the_space_before_it() -> None:
    lines = [line for each in drawn(Mixture("target", mixed_share=1.0), 600) for line in lines_with_choices(each)]
    begun = [(re.match(r"(.*[,:] )(adding|multiplying|sharing)\b", whole), shown) for whole, shown in lines]
    foreign = [(match, shown) for match, shown in begun if match is not None and shown.startswith("_")]
    words = [shown[match.end(1) - 1 : match.end(2)] for match, shown in foreign]
    assert len(words) > 8
    assert all(set(word) == {"_"} for word in words)


def test_a_share_outside_zero_and_one_is_refused() -> None:
    with pytest.raises(ValueError, match=r"graded_share is 1\.5"):
        Mixture(graded_share=1.5)


def test_a_missing_tokenizer_directory_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="does not exist"):
        LmDataModule(tmp_path / "absent", Mixture())


def test_padding_does_not_change_the_loss(tokenizer_dir: Path, words: PreTrainedTokenizerBase) -> None:
    torch.manual_seed(0)
    module = small_module(tokenizer_dir).eval()
    several = drawn(Mixture(), 4)
    together = LmBatches(several, words, 4, False, seed=0)[0]
    logits_NV, labels_N = module._predict(together)
    joint = nn.functional.cross_entropy(logits_NV, labels_N, reduction="sum")
    alone = torch.zeros(())
    for conversation in several:
        ids = words(conversation.text, return_tensors="pt")["input_ids"]
        logits_TV = module.lm(input_ids=ids).logits[0, :-1]
        alone += nn.functional.cross_entropy(logits_TV, ids[0, 1:], reduction="sum")
    torch.testing.assert_close(joint, alone)


def test_a_short_run_learns_and_is_the_same_under_the_same_seed(tokenizer_dir: Path) -> None:
    losses = []
    for _ in range(2):
        pl.seed_everything(0, verbose=False)
        losses.append(
            float(
                fit(small_module(tokenizer_dir, warmup_steps=2, lr=1e-2), tokenizer_dir, 320).callback_metrics[
                    "val/loss"
                ]
            )
        )
    assert losses[0] == losses[1] < 4.5


def test_the_next_phase_goes_on_from_the_first_and_refuses_another_size(tokenizer_dir: Path, tmp_path: Path) -> None:
    first = small_module(tokenizer_dir)
    first.lm.save_pretrained(tmp_path / "first")
    second = small_module(tokenizer_dir, init_from=tmp_path / "first")
    assert torch.equal(second.lm.model.embed_tokens.weight, first.lm.model.embed_tokens.weight)
    with pytest.raises(ValueError, match="hidden_size is 32, the run says 64"):
        small_module(tokenizer_dir, init_from=tmp_path / "first", hidden_size=64)


def test_the_export_loads_back_as_the_trained_weights_in_bf16(tokenizer_dir: Path, tmp_path: Path) -> None:
    module = small_module(tokenizer_dir)
    module.lm.save_pretrained(tmp_path / "trained")
    export_lm(tmp_path / "trained", tokenizer_dir, tmp_path / "lm")
    loaded = LlamaForCausalLM.from_pretrained(tmp_path / "lm", dtype=torch.float32)
    for name, weight in module.lm.named_parameters():
        torch.testing.assert_close(loaded.get_parameter(name), weight.bfloat16().float(), rtol=0, atol=0)
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight
    assert "lm_head.weight" not in load_file(tmp_path / "lm" / "model.safetensors")
    assert loaded.generation_config.do_sample is False
    assert len(AutoTokenizer.from_pretrained(tmp_path / "lm")) == loaded.config.vocab_size


def test_the_shipped_configs_are_the_phases_of_two_models_and_fit_their_classes() -> None:
    assert {config.stem for config in CONFIGS} == {phase for phases in _PHASES.values() for phase in phases}
    for config in CONFIGS:
        run = yaml.safe_load(config.read_text())
        sizes = {key: value for key, value in run["model"]["init_args"].items() if key.startswith(("hidden", "num_"))}
        assert sizes["num_layers"] == (8 if "target" in config.name else 2)
        mixture = Mixture(**run["data"]["init_args"]["mixture"])
        if config.name.endswith("_wordings.yaml"):
            assert mixture.style == "all"
            assert mixture.graded_share > 0
        else:
            assert mixture.style == ("target" if "target" in config.name else "draft")
            assert 0.05 <= mixture.all_wordings_share <= 0.1
