"""Distilling a draft LM: it comes nearer to its target, samples by row and epoch, keeps what decodes, and resumes where it was stopped."""

import json
import logging
import warnings
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from distilling import REPLY, distil_data, distil_module, fit, save_draft_lm, save_replies
from pytorch_lightning.callbacks import ModelCheckpoint
from pytorch_lightning.strategies import FSDPStrategy, ModelParallelStrategy, Strategy
from tiny import make_tokenizer
from training import VOCAB, make_trainer
from transformers import LlamaConfig, LlamaForCausalLM

from draftsmith.decode.engine import Engine
from draftsmith.decode.sampling import GenerationSettings
from draftsmith.models.drafters.draft_lm import LMDrafter
from draftsmith.models.drafters.drafter_folder import load_drafter
from draftsmith.models.files.loading import load_tokenizer
from draftsmith.models.target.target import Target
from draftsmith.models.tree.limits import DraftLimits
from draftsmith.train.draft_lm import callbacks as callbacks_file
from draftsmith.train.draft_lm import module as module_file
from draftsmith.train.draft_lm.callbacks import ChainDecodeValidation, KeepBestDraftLM
from draftsmith.train.draft_lm.data import DistilDataModule
from draftsmith.train.draft_lm.module import ACCEPTANCE, DraftLMModule
from draftsmith.train.draft_lm.padded_texts import pad_texts
from draftsmith.train.draft_lm.texts import DistilText, TextBatch
from draftsmith.train.drafter.starting_drafter import LoraSettings
from draftsmith.train.drafter_callbacks.run_length import RunLength
from draftsmith.train.losses.divergences import DIVERGENCES, DivergenceName
from draftsmith.train.run.strategies import FullyShard


@pytest.fixture(scope="module")
def speaker(tmp_path_factory: pytest.TempPathFactory, target_dir: Path) -> Path:
    """A target whose distributions are sharp enough that a draft LM can be far from them."""
    folder = tmp_path_factory.mktemp("speaker")
    torch.manual_seed(0)
    config = LlamaConfig.from_pretrained(target_dir, initializer_range=0.4, tie_word_embeddings=False)
    LlamaForCausalLM(config).save_pretrained(folder)
    load_tokenizer(str(target_dir)).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def draft_lm(tmp_path_factory: pytest.TempPathFactory, speaker: Path) -> Path:
    return save_draft_lm(tmp_path_factory.mktemp("draft"), speaker)


@pytest.fixture(scope="module")
def replies(tmp_path_factory: pytest.TempPathFactory, speaker: Path) -> Path:
    return save_replies(tmp_path_factory.mktemp("replies") / "replies.jsonl", Target.load(str(speaker)))


@pytest.fixture(scope="module")
def many_replies(tmp_path_factory: pytest.TempPathFactory, speaker: Path) -> Path:
    """Enough that what is learnt from them holds for others, whichever were drawn."""
    return save_replies(tmp_path_factory.mktemp("many") / "replies.jsonl", Target.load(str(speaker)), count=60)


def set_up(root: Path, module: DraftLMModule, data: Any) -> None:
    """Everything but training."""
    make_trainer(root, max_epochs=0).fit(module, data)


def save_prompts(folder: Path) -> Path:
    """Ten prompts without replies."""
    prompts = folder / "prompts.jsonl"
    rows = [{"id": f"p{row}", "messages": [{"role": "user", "content": f"w{row + 2} w9"}]} for row in range(10)]
    prompts.write_text("".join(json.dumps({**row, "split": "train", "source": "s"}) + "\n" for row in rows))
    return prompts


def weights(module: DraftLMModule) -> dict[str, torch.Tensor]:
    return {name: weight.detach().clone() for name, weight in module.student.lm.named_parameters()}


def test_the_state_at_a_token_meets_the_next_one() -> None:
    texts = [DistilText(0, [5, 6, 7, 8], [False, False, True, True], 2), DistilText(1, [9, 4], [False, True], 1)]
    padded = pad_texts(texts)
    assert padded.ids_BT.tolist() == [[5, 6, 7, 8], [9, 4, 0, 0]]
    assert padded.keep_mask_BT.int().tolist() == [[0, 1, 1, 0], [1, 0, 0, 0]]
    assert padded.labels_R.tolist() == [7, 8, 4]


@pytest.mark.parametrize(
    ("divergence", "on_policy", "lora", "gain"),
    [
        *((name, 1.0, None, 0.03) for name in DIVERGENCES[:4]),
        ("forward_kl", 0.5, None, 0.03),
        ("forward_kl", 0.0, None, 0.03),
        # Behind a random body, the head is where a few numbers do something.
        ("forward_kl", 1.0, LoraSettings(8, 16.0, target_modules=["q_proj", "down_proj", "lm_head"]), 0.01),
    ],
)
def test_distilling_raises_the_acceptance_on_unseen_prompts(
    speaker: Path, draft_lm: Path, many_replies: Path, tmp_path: Path,
    divergence: DivergenceName, on_policy: float, lora: LoraSettings | None, gain: float,
) -> None:  # fmt: skip
    module = distil_module(speaker, draft_lm, divergence=divergence, lora=lora)
    data = distil_data(many_replies, on_policy=on_policy)
    [before] = make_trainer(tmp_path).validate(module, data, verbose=False)
    after = fit(tmp_path, module, data, max_epochs=10).callback_metrics
    assert float(after[ACCEPTANCE]) > before[ACCEPTANCE] + gain


def test_plain_fine_tuning_lowers_the_cross_entropy_of_the_replies(
    speaker: Path, draft_lm: Path, replies: Path, tmp_path: Path
) -> None:
    module, data = distil_module(speaker, draft_lm, divergence="cross_entropy"), distil_data(replies, on_policy=0.0)
    first = fit(tmp_path, module, data, max_epochs=1, limit_train_batches=1).callback_metrics
    last = fit(tmp_path, module, data, max_epochs=10).callback_metrics
    assert float(last["train/loss"]) < float(first["train/loss"]) - 0.3
    assert "train/acceptance" not in last
    assert ACCEPTANCE in last


def test_the_acceptance_is_that_of_the_two_models_along_the_targets_reply(
    speaker: Path, draft_lm: Path, replies: Path, tmp_path: Path
) -> None:
    module, data = distil_module(speaker, draft_lm), distil_data(replies)
    [found] = make_trainer(tmp_path).validate(module, data, verbose=False)
    rows = [json.loads(line) for line in replies.read_text().splitlines()]
    models = [LlamaForCausalLM.from_pretrained(folder).eval() for folder in (speaker, draft_lm)]
    accepted = []
    for number in data.val_rows:
        row = rows[number]
        ids = torch.tensor([row["prompt_ids"] + row["reply_ids"]])
        with torch.no_grad():
            target, draft = (model(input_ids=ids).logits[0].softmax(-1) for model in models)
        accepted.append(torch.minimum(target, draft).sum(-1)[len(row["prompt_ids"]) - 1 : -1])
    assert found[ACCEPTANCE] == pytest.approx(float(torch.cat(accepted).mean()), abs=1e-5)


def test_prompts_alone_are_held_out_with_the_targets_greedy_replies(
    speaker: Path, draft_lm: Path, tmp_path: Path
) -> None:
    data = DistilDataModule(prompts=save_prompts(tmp_path), template="none", batch_size=4, val_fraction=0.2)
    module = distil_module(speaker, draft_lm)
    metrics = fit(tmp_path, module, data, callbacks=[ChainDecodeValidation(2, 4)]).callback_metrics
    target = Target.load(str(speaker))
    settings = GenerationSettings(REPLY, eos_token_ids=target.eos_token_ids)
    wanted = Engine(target).generate(data.val_prompts(2), settings)
    found = [module.held_out_replies.by_row[number] for number in data.val_rows]
    assert found == [reply.token_ids for reply in wanted]
    assert 0.0 < float(metrics[ACCEPTANCE]) < 1.0


def test_a_resumed_run_asks_the_target_for_no_reply_twice(
    speaker: Path, draft_lm: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[int] = []

    class Counting(Engine):
        def generate(self, prompts: Any, *arguments: Any, **settings: Any) -> Any:
            asked.append(len(prompts))
            return super().generate(prompts, *arguments, **settings)

    monkeypatch.setattr(module_file, "Engine", Counting)
    prompts = save_prompts(tmp_path)

    def run(max_epochs: int, resume: bool, **settings: Any) -> tuple[int, float]:
        asked.clear()
        data = DistilDataModule(prompts=prompts, template="none", batch_size=4, val_fraction=0.2)
        saver = ModelCheckpoint(tmp_path, save_top_k=0, save_last=True, enable_version_counter=False)
        trainer = make_trainer(tmp_path, max_epochs=max_epochs, enable_checkpointing=True, callbacks=[saver])
        module = distil_module(speaker, draft_lm, **settings)
        trainer.fit(module, data, ckpt_path=tmp_path / "last.ckpt" if resume else None)
        return sum(asked), float(trainer.callback_metrics[ACCEPTANCE])

    answered, whole = run(2, False)
    assert answered == 2
    run(1, False)
    assert run(2, True) == (0, whole)
    # Longer replies are others.
    assert run(3, True, max_new_tokens=REPLY + 1)[0] == 2


def test_a_sample_belongs_to_its_row_and_epoch_and_to_nothing_else(
    speaker: Path, draft_lm: Path, replies: Path, tmp_path: Path
) -> None:
    module, data = distil_module(speaker, draft_lm), distil_data(replies)
    set_up(tmp_path, module, data)

    def sampled(numbers: list[int], epoch: int) -> dict[int, list[int]]:
        batch = TextBatch([data.store.text(number) for number in numbers])
        return {text.number: text.ids for text in module.texts_of(batch, epoch)}

    rows = data.train_rows[:6]
    first = sampled(rows, 0)
    torch.manual_seed(99)
    assert sampled(rows[::-1], 0) == first
    assert sampled(rows[2:3], 0)[rows[2]] == first[rows[2]]
    assert sampled(rows, 1) != first
    assert distil_module(speaker, draft_lm, seed=1).sampling.seed != module.sampling.seed
    module.sampling = GenerationSettings(REPLY, temperature=1.0, seed=1)
    assert sampled(rows, 0) != first


def test_on_policy_rows_hold_the_draft_lms_reply_and_the_others_the_targets(
    speaker: Path, draft_lm: Path, replies: Path, tmp_path: Path
) -> None:
    module, data = distil_module(speaker, draft_lm, temperature=0.0), distil_data(replies, on_policy=0.5)
    set_up(tmp_path, module, data)
    rows = [json.loads(line) for line in replies.read_text().splitlines()]
    own = Engine(Target.load(str(draft_lm)))
    settings = GenerationSettings(REPLY, eos_token_ids=module.eos_token_ids)
    texts = module.texts_of(TextBatch([data.store.text(number) for number in data.train_rows]), 3)
    kinds = []
    for text in texts:
        prompt = rows[text.number]["prompt_ids"]
        on_policy = data.is_on_policy(text.number, 3)
        wanted = own.generate([prompt], settings)[0].token_ids if on_policy else rows[text.number]["reply_ids"]
        assert text.ids == prompt + wanted
        assert text.labelled == [False] * len(prompt) + [True] * len(wanted)
        kinds.append(on_policy)
    assert sum(kinds) == len(kinds) // 2


def test_sampled_replies_that_hold_nothing_of_what_is_trained_on_change_no_weight(
    speaker: Path, draft_lm: Path, replies: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def nothing_learned(data: DistilDataModule, text: DistilText, reply: list[int]) -> DistilText:
        return text.with_reply(reply, data.max_length, [False] * len(reply))

    monkeypatch.setattr(DistilDataModule, "answered", nothing_learned)
    module = distil_module(speaker, draft_lm)
    set_up(tmp_path / "before", module, distil_data(replies))
    before = weights(module)
    trainer = fit(tmp_path, module, distil_data(replies, val_fraction=0.0), limit_train_batches=1)
    assert float(trainer.callback_metrics["train/loss"]) == 0.0
    assert all(torch.equal(weight, before[name]) for name, weight in weights(module).items())


def test_samples_come_from_the_weights_of_this_very_step(
    speaker: Path, draft_lm: Path, replies: Path, tmp_path: Path
) -> None:
    module, data = distil_module(speaker, draft_lm, temperature=0.0, lr=0.05), distil_data(replies)
    set_up(tmp_path, module, data)
    batch = TextBatch([data.store.text(number) for number in data.train_rows])
    before = [text.ids for text in module.texts_of(batch, 0)]
    with torch.no_grad():
        for weight in module.student.lm.parameters():
            weight.add_(torch.randn_like(weight))
    after = [text.ids for text in module.texts_of(batch, 0)]
    assert after != before
    settings = GenerationSettings(REPLY, eos_token_ids=module.eos_token_ids)
    fresh = Engine(Target.from_model(LlamaForCausalLM.from_pretrained(draft_lm).eval()))
    fresh.target.model.load_state_dict(module.student.lm.state_dict())
    prompts = [text.prompt_ids for text in batch.texts]
    wanted = [generation.token_ids for generation in fresh.generate(prompts, settings)]
    assert after == [prompt + reply for prompt, reply in zip(prompts, wanted, strict=True)]


def test_lora_trains_the_adapter_and_nothing_else_and_is_kept_as_peft_writes_it(
    speaker: Path, draft_lm: Path, replies: Path, tmp_path: Path
) -> None:
    module = distil_module(speaker, draft_lm, lora=LoraSettings(2))
    set_up(tmp_path / "before", module, distil_data(replies))
    before = weights(module)
    fit(tmp_path, module, distil_data(replies), callbacks=[KeepBestDraftLM()])
    changed = {name for name, weight in weights(module).items() if not torch.equal(weight, before[name])}
    assert changed
    assert all("lora_" in name for name in changed)
    trained = sum(weight.numel() for weight in module.parameters() if weight.requires_grad)
    assert 0 < trained < sum(weight.numel() for weight in module.parameters()) / 3
    kept = tmp_path / "draft_lm"
    assert (kept / "adapter_model.safetensors").stat().st_size < (draft_lm / "model.safetensors").stat().st_size
    assert json.loads((kept / "adapter_config.json").read_text())["base_model_name_or_path"] == str(draft_lm)
    assert_same_logits(module, load_drafter(kept))


def assert_same_logits(module: DraftLMModule, kept: Any) -> None:
    assert isinstance(kept, LMDrafter)
    ids = torch.arange(2, 12)[None]
    with torch.no_grad():
        wanted = module.student.lm(input_ids=ids).logits
    assert torch.allclose(kept.lm.logits(kept.lm.prefix(ids).normed), wanted, atol=1e-5)


def test_the_kept_folder_drafts_as_validation_saw_it(
    speaker: Path, draft_lm: Path, replies: Path, tmp_path: Path
) -> None:
    module, data = distil_module(speaker, draft_lm), distil_data(replies)
    trainer = fit(
        tmp_path, module, data, max_epochs=2, callbacks=[ChainDecodeValidation(4, REPLY, "1x3"), KeepBestDraftLM()]
    )
    kept = load_drafter(tmp_path / "draft_lm")
    names = {path.name for path in (tmp_path / "draft_lm").iterdir()}
    assert {"config.json", "model.safetensors", "tokenizer.json", "provenance.json"} <= names
    target = Target.load(str(speaker))
    engine = Engine(target, kept, DraftLimits(1, 3), load_tokenizer(str(speaker)))
    found = engine.generate(data.val_prompts(4), GenerationSettings(REPLY, eos_token_ids=target.eos_token_ids))
    record = json.loads((tmp_path / "draft_lm" / "provenance.json").read_text())
    emitted, cycles = sum(len(one.token_ids) - 1 for one in found), sum(len(one.accepted) for one in found)
    assert emitted / cycles == pytest.approx(record["config"]["metrics"]["val/tokens_per_step"], abs=1e-5)
    assert record["config"]["divergence"] == {"name": "forward_kl", "beta": 0.5, "eta": 3.0}
    assert record["inputs"][str(speaker)] == target.fingerprint
    if record["config"]["step"] == trainer.global_step:
        assert_same_logits(module, kept)


def test_kept_weights_may_be_of_another_dtype(speaker: Path, draft_lm: Path, replies: Path, tmp_path: Path) -> None:
    module = distil_module(speaker, draft_lm)
    fit(tmp_path, module, distil_data(replies), limit_train_batches=1, callbacks=[KeepBestDraftLM(dtype="bfloat16")])
    from safetensors.torch import load_file

    saved = load_file(tmp_path / "draft_lm" / "model.safetensors")
    assert {weight.dtype for weight in saved.values()} == {torch.bfloat16}
    assert next(module.parameters()).dtype == torch.float32
    load_drafter(tmp_path / "draft_lm")


def test_the_target_is_left_as_it_is_and_stays_out_of_checkpoints(
    speaker: Path, draft_lm: Path, replies: Path, tmp_path: Path
) -> None:
    module = distil_module(speaker, draft_lm)
    saver = ModelCheckpoint(tmp_path, save_top_k=0, save_last=True, enable_version_counter=False)
    fit(tmp_path, module, distil_data(replies), callbacks=[saver], enable_checkpointing=True)
    original = Target.load(str(speaker)).model.state_dict()
    assert all(torch.equal(weight, original[name]) for name, weight in module.target.model.state_dict().items())
    kept = torch.load(tmp_path / "last.ckpt", weights_only=True)["state_dict"]
    assert set(kept) == {f"lm.{name}" for name in module.student.lm.state_dict()}


class StopAfter(pl.Callback):
    """Ends a run after so many steps, in the middle of an epoch."""

    def __init__(self, steps: int) -> None:
        self.steps = steps

    def on_train_batch_end(self, trainer: pl.Trainer, *args: Any, **kwargs: Any) -> None:
        if trainer.global_step == self.steps:
            raise KeyboardInterrupt


@pytest.mark.parametrize("lora", [None, LoraSettings(2)])
def test_a_run_stopped_in_the_middle_of_an_epoch_ends_with_the_same_weights(
    speaker: Path, draft_lm: Path, replies: Path, tmp_path: Path, lora: LoraSettings | None
) -> None:
    def run(name: str, stop: int | None, checkpoint: Path | None = None) -> DraftLMModule:
        pl.seed_everything(0 if checkpoint is None else 7, verbose=False)
        module = distil_module(speaker, draft_lm, lora=lora, min_lr_ratio=0.0)
        saver = ModelCheckpoint(
            tmp_path / name, save_top_k=0, save_last=True, every_n_train_steps=1, enable_version_counter=False
        )
        callbacks: list[pl.Callback] = [saver, ChainDecodeValidation(2, 4)]
        if stop is not None:
            callbacks.append(StopAfter(stop))
        trainer = make_trainer(tmp_path / name, max_epochs=3, enable_checkpointing=True, callbacks=callbacks)
        try:
            trainer.fit(module, distil_data(replies, on_policy=0.5), ckpt_path=checkpoint)
        except (KeyboardInterrupt, SystemExit):
            assert stop is not None
        return module

    whole = weights(run("whole", None))
    run("half", 6)
    # Four steps are an epoch; the sixth was cut off before it was saved.
    assert torch.load(tmp_path / "half" / "last.ckpt", weights_only=True)["global_step"] == 5
    rest = weights(run("half", None, tmp_path / "half" / "last.ckpt"))
    assert all(torch.equal(weight, rest[name]) for name, weight in whole.items())


def test_the_loss_of_a_rank_makes_up_for_the_mean_that_ddp_takes(
    speaker: Path, draft_lm: Path, replies: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module, data = distil_module(speaker, draft_lm), distil_data(replies, on_policy=0.0)
    set_up(tmp_path, module, data)
    monkeypatch.setattr(module, "log", lambda *args, **kwargs: None)
    batch = TextBatch([data.store.text(number) for number in data.train_rows[:3]])
    alone = module.training_step(batch, 0)
    monkeypatch.setattr(module_file, "world_size", lambda _: 4)
    monkeypatch.setattr(module_file, "sum_over_ranks", lambda _, values: 4 * values)
    assert module.training_step(batch, 0).item() == pytest.approx(alone.item())
    # The others hold many more tokens, so that this rank's share of the joint mean is smaller.
    monkeypatch.setattr(module_file, "sum_over_ranks", lambda _, values: 16 * values)
    assert module.training_step(batch, 0).item() == pytest.approx(alone.item() / 4)


def test_all_processes_stop_for_a_loss_that_only_another_one_cannot_tell(
    speaker: Path, draft_lm: Path, replies: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module, data = distil_module(speaker, draft_lm), distil_data(replies, on_policy=0.0)
    set_up(tmp_path, module, data)
    monkeypatch.setattr(module, "log", lambda *args, **kwargs: None)
    # The others' rows are counts, their losses are not finite.
    monkeypatch.setattr(module_file, "sum_over_ranks", lambda _, values: values * (torch.nan if values.ndim else 2.0))
    batch = TextBatch([data.store.text(number) for number in data.train_rows[:3]])
    with pytest.raises(ValueError, match=r"the loss is nan at step 0 \(\d"):
        module.training_step(batch, 0)


def test_padded_rows_of_either_vocabulary_do_no_harm(speaker: Path, replies: Path, tmp_path: Path) -> None:
    for vocab_size in (VOCAB + 3, VOCAB):
        padded = save_draft_lm(tmp_path / str(vocab_size), speaker, vocab_size)
        module, data = distil_module(speaker, padded), distil_data(replies)
        set_up(tmp_path, module, data)
        with torch.no_grad():  # a draft LM that would say nothing but what the target has not
            module.student.lm.get_output_embeddings().weight[VOCAB:] *= 1000.0
        texts = module.texts_of(TextBatch([data.store.text(number) for number in data.train_rows]), 0)
        assert max(max(text.ids) for text in texts) < VOCAB
        assert torch.isfinite(fit(tmp_path, module, data).callback_metrics["val/loss"])


def test_a_draft_lm_with_fewer_rows_reads_unknown_tokens_as_its_last(
    speaker: Path, replies: Path, tmp_path: Path
) -> None:
    small = save_draft_lm(tmp_path / "small", speaker, VOCAB - 4)
    trainer = fit(
        tmp_path, distil_module(speaker, small), distil_data(replies), callbacks=[ChainDecodeValidation(2, 4)]
    )
    metrics = trainer.callback_metrics
    assert torch.isfinite(metrics["val/loss"])
    assert 0.0 < float(metrics[ACCEPTANCE]) < 1.0


def test_bf16_autocast_trains_although_the_same_weights_sample_before(
    speaker: Path, draft_lm: Path, replies: Path, tmp_path: Path
) -> None:
    module = distil_module(speaker, draft_lm)
    set_up(tmp_path, module, distil_data(replies))
    before = weights(module)
    fit(tmp_path, module, distil_data(replies), precision="bf16-mixed", limit_train_batches=1)
    after = weights(module)
    assert all(not torch.equal(weight, after[name]) for name, weight in before.items())


def test_prompts_alone_are_answered_under_autocast_as_without(speaker: Path, draft_lm: Path, tmp_path: Path) -> None:
    answered = []
    for precision in ("32-true", "bf16-mixed"):
        data = DistilDataModule(prompts=save_prompts(tmp_path), template="none", batch_size=4, val_fraction=0.2)
        module = distil_module(speaker, draft_lm)
        fit(tmp_path, module, data, precision=precision, limit_train_batches=1)
        answered.append(module.held_out_replies.by_row)
    assert len(answered[0]) == 2
    assert answered[0] == answered[1]


def test_the_copy_that_samples_rounds_weights_and_leaves_positions_exact(
    speaker: Path, draft_lm: Path, replies: Path, tmp_path: Path
) -> None:
    module = distil_module(speaker, draft_lm)
    set_up(tmp_path, module, distil_data(replies))
    with torch.autocast("cpu", torch.bfloat16):
        sampler = module.student._sampler()
    assert {weight.dtype for weight in sampler.model.parameters()} == {torch.bfloat16}
    own = dict(module.student.lm.named_buffers())
    assert own
    assert all(torch.equal(buffer, own[name]) for name, buffer in sampler.model.named_buffers())
    assert {weight.dtype for weight in module.student.lm.parameters()} == {torch.float32}


def test_a_precision_that_casts_all_of_the_draft_lm_is_refused(
    speaker: Path, draft_lm: Path, replies: Path, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=r"trainer\.precision is bf16-true"):
        fit(tmp_path, distil_module(speaker, draft_lm), distil_data(replies), precision="bf16-true")


def test_an_adapter_over_bf16_weights_is_trained_in_float32(
    speaker: Path, draft_lm: Path, replies: Path, tmp_path: Path
) -> None:
    module = distil_module(speaker, draft_lm, lora=LoraSettings(2), dtype="bfloat16", target_dtype="bfloat16")
    metrics = fit(tmp_path, module, distil_data(replies), callbacks=[ChainDecodeValidation(2, 4)]).callback_metrics
    kinds = {weight.requires_grad: weight.dtype for weight in module.student.lm.parameters()}
    assert kinds == {True: torch.float32, False: torch.bfloat16}
    assert 0.0 < float(metrics[ACCEPTANCE]) < 1.0


def test_a_checkpoint_of_an_adapter_leaves_the_draft_lm_out_and_knows_which_it_was(
    speaker: Path, draft_lm: Path, replies: Path, tmp_path: Path
) -> None:
    lora = LoraSettings(2)
    saver = ModelCheckpoint(tmp_path, save_top_k=0, save_last=True, enable_version_counter=False)
    fit(
        tmp_path,
        distil_module(speaker, draft_lm, lora=lora),
        distil_data(replies),
        callbacks=[saver],
        enable_checkpointing=True,
    )
    path = tmp_path / "last.ckpt"
    kept = torch.load(path, weights_only=True)["state_dict"]
    assert kept
    assert all("lora_" in name for name in kept)
    other = save_draft_lm(tmp_path / "other", speaker, seed=6)
    for module, told in (
        (distil_module(speaker, other, lora=lora), "made with draft_lm"),
        (distil_module(speaker, draft_lm), "made with lora = True"),
    ):
        with pytest.raises(ValueError, match=told):
            make_trainer(tmp_path, max_epochs=2).fit(module, distil_data(replies), ckpt_path=path)


def test_a_checkpoint_of_another_module_is_refused_in_words(
    speaker: Path, draft_lm: Path, replies: Path, tmp_path: Path
) -> None:
    module = distil_module(speaker, draft_lm)
    set_up(tmp_path, module, distil_data(replies))
    with pytest.raises(ValueError, match=r"does not say its draft_lm, so no DraftLMModule has written it; give "):
        module.on_load_checkpoint({"state_dict": {}})


def test_sampled_chains_are_measured_at_a_temperature(
    speaker: Path, draft_lm: Path, replies: Path, tmp_path: Path
) -> None:
    chain = ChainDecodeValidation(4, REPLY, "s1.1", temperature=1.0)
    metrics = fit(tmp_path, distil_module(speaker, draft_lm), distil_data(replies), callbacks=[chain]).callback_metrics
    assert 1.0 <= float(metrics["val/tokens_per_step"]) <= 3.0
    with pytest.raises(ValueError, match="is sampled; give a temperature"):
        ChainDecodeValidation(shape="s1.1")


def test_chains_are_decoded_within_a_share_of_the_training_time(
    speaker: Path, draft_lm: Path, replies: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With next to no time each validation decodes one batch of one prompt; without a share it decodes all four."""
    decoded: list[int] = []
    log = callbacks_file.log_acceptance

    def counted(module: pl.LightningModule, generations: list[Any], depth: int) -> None:
        decoded.append(len(generations))
        log(module, generations, depth)

    monkeypatch.setattr(callbacks_file, "log_acceptance", counted)
    for share in (1e-9, None):
        chain = ChainDecodeValidation(4, REPLY, batch_size=1, time_share=share)
        fit(tmp_path, distil_module(speaker, draft_lm), distil_data(replies), max_epochs=2, callbacks=[chain])
        assert chain.state_dict() == {"rounds": None if share is None else 1}
    assert decoded == [1, 1, 4, 4]


def test_a_run_says_what_it_learns_from(
    speaker: Path, draft_lm: Path, replies: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    data = distil_data(replies, on_policy=0.5)
    with caplog.at_level(logging.INFO):
        fit(tmp_path, distil_module(speaker, draft_lm), data, callbacks=[RunLength(), ChainDecodeValidation(2, 4)])
    said = [record.message for record in caplog.records]
    rows = [json.loads(line)["reply_ids"] for line in replies.read_text().splitlines()]
    tokens = [token for number in data.train_rows for token in rows[number]]
    text = f"it trains on 16 rows with {len(tokens)} labelled tokens, {len(set(tokens))} distinct of a vocabulary of {VOCAB}"
    assert text in said
    assert "the draft LM answers 8 of these rows itself in each epoch, and learns from its own tokens there" in said
    assert any(
        "a validation comes every 4 batches" in line and "at most 15 % of the training time" in line for line in said
    )


@pytest.mark.parametrize(("lora", "dtype"), [(None, "float32"), (LoraSettings(8, 16.0), "bfloat16")])
def test_only_weights_below_an_adapter_take_the_checkpoints_dtype_on_cuda(
    speaker: Path, tmp_path: Path, lora: LoraSettings | None, dtype: str
) -> None:
    LlamaForCausalLM.from_pretrained(speaker).to(torch.bfloat16).save_pretrained(tmp_path)
    module = distil_module(speaker, tmp_path, lora=lora)
    assert module._resolved_own_dtype("cuda:0") == dtype
    assert module._resolved_own_dtype("cpu") == "float32"


def test_a_run_leaves_the_warnings_of_its_process_alone(
    speaker: Path, draft_lm: Path, replies: Path, tmp_path: Path
) -> None:
    filters = list(warnings.filters)
    set_up(tmp_path, distil_module(speaker, draft_lm), distil_data(replies))
    assert warnings.filters == filters


def test_a_draft_lm_with_another_tokenizer_is_refused(speaker: Path, replies: Path, tmp_path: Path) -> None:
    foreign = save_draft_lm(tmp_path / "foreign", speaker)
    make_tokenizer().save_pretrained(foreign)
    with pytest.raises(ValueError, match="has another tokenizer"):
        set_up(tmp_path, distil_module(speaker, foreign), distil_data(replies))


def test_parts_that_do_not_fit_together_are_refused(
    speaker: Path, draft_lm: Path, replies: Path, tmp_path: Path
) -> None:
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text("{}")
    for module, data, told in (
        (
            distil_module(speaker, draft_lm, divergence="cross_entropy"),
            distil_data(replies),
            "set the data's on_policy to 0",
        ),
        (distil_module(speaker, adapter), distil_data(replies), "is an adapter"),
        (distil_module(speaker, draft_lm), pl.LightningDataModule(), "give it DistilDataModule"),
    ):
        with pytest.raises(ValueError, match=told):
            set_up(tmp_path, module, data)
    trainer, other = make_trainer(tmp_path), pl.LightningModule()
    with pytest.raises(ValueError, match="serves DraftLMModule"):
        ChainDecodeValidation().on_validation_epoch_end(trainer, other)
    with pytest.raises(ValueError, match="serves DraftLMModule"):
        KeepBestDraftLM().on_train_end(trainer, other)


@pytest.mark.parametrize("strategy", [FullyShard(), ModelParallelStrategy(), FSDPStrategy()])
def test_a_strategy_that_divides_the_draft_lm_is_refused(
    speaker: Path, draft_lm: Path, replies: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, strategy: Strategy
) -> None:
    module = distil_module(speaker, draft_lm)
    set_up(tmp_path, module, distil_data(replies))
    monkeypatch.setattr(pl.Trainer, "strategy", strategy)
    with pytest.raises(
        ValueError, match=f"strategy is {type(strategy).__name__}, which may keep the draft LM in pieces"
    ):
        module.setup("fit")


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"warmup_ratio": 1.5}, "warmup_ratio is 1.5"),
        ({"sampling_rows": 0}, "sampling_rows is 0"),
        ({"temperature": -1.0}, "temperature is -1.0"),
        ({"max_new_tokens": 0}, "max_new_tokens is 0"),
        ({"divergence": "kl"}, "divergence 'kl'"),
        ({"target_sharding": "fsdp2", "adapter": "x"}, "target_sharding 'fsdp2' places"),
        ({"lora": LoraSettings(2, dropout=0.1)}, "lora dropout is 0.1"),
    ],
)
def test_settings_out_of_range_are_refused(settings: dict[str, Any], told: str) -> None:
    with pytest.raises(ValueError, match=told):
        distil_module(Path("target"), Path("draft"), **settings)
