"""Large vocabularies: a run proposes the most frequent tokens, says what they cover, and takes them where the user says so."""

import logging
from pathlib import Path

import pytest
import torch
from training import VOCAB, MakeCache, make_module, make_trainer

from draftsmith.models.families.redrafter import ReDrafterFamily
from draftsmith.train.batches.data_module import CacheDataModule
from draftsmith.train.batches.labelled_text import COVERED_HELD_OUT, LabelledText, VocabularyRule, covering_size
from draftsmith.train.drafter.module import DraftModule
from draftsmith.train.drafter_callbacks.run_length import RunLength

SMALL = VocabularyRule(above=30, size=8)


@pytest.fixture(scope="module")
def cache(make_cache: MakeCache) -> Path:
    return make_cache([9] * 10)


def printed(
    target_dir: Path,
    cache: Path,
    root: Path,
    caplog: pytest.LogCaptureFixture,
    rule: VocabularyRule,
    **settings: object,
) -> tuple[str, DraftModule, CacheDataModule]:
    module = make_module(target_dir, **settings)
    module.vocabulary_rule = rule
    data = CacheDataModule(cache, val_fraction=0.2, tokens_per_batch=20)
    with caplog.at_level(logging.INFO):
        make_trainer(root, callbacks=[RunLength()], max_steps=1).fit(module, data)
    return caplog.text, module, data


def shares(data: CacheDataModule, kept: torch.Tensor) -> list[str]:
    """Of the labelled tokens of the training samples and of the held-out ones, by hand."""
    texts = []
    for subset in (data.train_set, data.val_set):
        assert subset is not None
        labelled = torch.cat([ids[mask] for ids, mask in subset.cache.texts(subset.indices)])
        texts.append(f"{int(1000 * torch.isin(labelled, kept).sum() // len(labelled)) / 10:.1f} %")
    return texts


def test_a_run_proposes_the_most_frequent_tokens_of_a_large_vocabulary_and_says_how_to_take_them(
    target_dir: Path, cache: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    text, module, data = printed(target_dir, cache, tmp_path, caplog, SMALL)
    assert f"this drafter scores all {VOCAB} tokens of the target; the 8 that are labelled most often hold" in text
    kept = data.token_counts(VOCAB).sort(descending=True, stable=True).indices[:8]
    own, held_out = shares(data, kept)
    assert f"hold {own} of the labelled tokens and {held_out} of the held-out ones" in text
    assert "set model.init_args.draft_vocabulary to auto" in text
    assert module.drafter is not None
    assert len(module.drafter.draft_ids()) == VOCAB, "a proposal changes nothing"


def test_auto_takes_the_proposal_records_it_and_says_what_it_covers(
    target_dir: Path, cache: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    text, module, data = printed(target_dir, cache, tmp_path, caplog, SMALL, draft_vocabulary="auto")
    assert module.drafter is not None
    kept = module.drafter.draft_ids()
    assert (
        kept.tolist() == data.token_counts(VOCAB).sort(descending=True, stable=True).indices[:8].sort().values.tolist()
    )
    own, held_out = shares(data, kept)
    assert f"the 8 most frequent tokens hold {own} of the labelled tokens and {held_out} of the held-out ones" in text
    assert "this drafter scores all" not in text
    assert module.settings()["draft_vocabulary"] == "auto"


def test_auto_keeps_a_small_vocabulary_whole_and_says_so(
    target_dir: Path, cache: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    rule = VocabularyRule(above=VOCAB, size=8)
    text, module, _ = printed(target_dir, cache, tmp_path, caplog, rule, draft_vocabulary="auto")
    assert f"its draft vocabulary is whole: {VOCAB} tokens are not above {VOCAB}" in text
    assert module.drafter is not None
    assert len(module.drafter.draft_ids()) == VOCAB


@pytest.mark.parametrize(
    "settings",
    [{"drafter": ReDrafterFamily(draft_vocab_size=20)}, {"init_from": Path("a/drafter")}],
    ids=["draft_vocab_size", "init_from"],
)
def test_auto_beside_another_choice_is_an_error(target_dir: Path, settings: dict[str, object]) -> None:
    with pytest.raises(ValueError, match="leave one of the two null"):
        make_module(target_dir, draft_vocabulary="auto", **settings)


def test_a_proposal_without_held_out_text_speaks_of_the_training_text_alone() -> None:
    counts = torch.zeros(40, dtype=torch.int64)
    counts[[3, 9, 30]] = torch.tensor([9996, 3, 1])
    rule = VocabularyRule(above=30, size=1)
    line = LabelledText(counts, 1, 1, draft_vocabulary=40, rule=rule).lines()[1]
    assert "hold 99.9 % of the labelled tokens, and would make its head 40.0 times smaller" in line
    assert VocabularyRule().size_for(65_536) is None
    assert VocabularyRule().size_for(128_256) == 32_768


def test_a_covering_vocabulary_is_the_smallest_that_holds_the_held_out_text() -> None:
    counts, held_out = torch.tensor([5, 9, 0, 7, 1, 0, 0, 0]), torch.tensor([50, 40, 0, 5, 0, 5, 0, 0])
    # By frequency: 1, 3, 0, 4, ... They hold 40, 45, 95, 95 of 100.
    assert covering_size(counts, held_out, 0.4) == 1
    assert covering_size(counts, held_out, 0.45) == 2
    assert covering_size(counts, held_out, 0.95) == 4
    assert covering_size(counts, held_out, 0.96) is None, "half of the vocabulary is not enough"


def test_covering_counts_the_held_out_samples_and_says_what_it_chose(
    target_dir: Path, cache: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    text, module, data = printed(target_dir, cache, tmp_path, caplog, SMALL, draft_vocabulary="covering")
    assert module.drafter is not None
    held_out = data.held_out_token_counts(VOCAB, 100)
    assert held_out is not None
    size = covering_size(data.token_counts(VOCAB), held_out, COVERED_HELD_OUT)
    assert len(module.drafter.draft_ids()) == (VOCAB if size is None else size)
    assert "its draft vocabulary is" in text


def test_covering_without_held_out_samples_is_an_error(target_dir: Path, cache: Path, tmp_path: Path) -> None:
    module = make_module(target_dir, draft_vocabulary="covering")
    with pytest.raises(ValueError, match="none is held out; give val_cache or a val_fraction above 0"):
        make_trainer(tmp_path, max_steps=1).fit(module, CacheDataModule(cache, val_fraction=0.0, tokens_per_batch=20))
