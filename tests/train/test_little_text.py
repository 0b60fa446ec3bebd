"""Plain documents first, the target's replies then: the two runs of the how-to, at a tiny size."""

from __future__ import annotations

import json
from pathlib import Path

from training import MakeCache, tiny_config

from draftsmith.cli import main
from draftsmith.data.cache.reader import HiddenStateCache
from draftsmith.models.drafters.drafter_folder import load_drafter


def test_documents_come_first_and_replies_continue_what_they_taught(
    target_dir: Path, make_cache: MakeCache, tmp_path: Path
) -> None:
    documents, text = tmp_path / "documents.jsonl", tmp_path / "documents"
    words = [" ".join(f"w{2 + (start + step) % 30}" for step in range(12)) for start in range(20)]
    documents.write_text("".join(json.dumps({"text": document}) + "\n" for document in words))
    template = ["--template", "none"]
    assert (
        main(
            ["data", "extract", "--target", str(target_dir), "--source", str(documents), "--out", str(text), *template]
        )
        == 0
    )
    manifest = HiddenStateCache(text).manifest
    assert manifest.num_labelled == manifest.num_tokens - len(words), (
        "all but the first token of a document are labelled"
    )

    replies = make_cache([9] * 10)
    config = tiny_config(tmp_path, target_dir, replies)
    run = ["train", "fit", f"--config={config}", "--recipe=auto", "--trainer.max_epochs=1"]
    own = ["--model.init_args.distillation=path"]
    first = [f"--data.init_args.cache={text}", f"--data.init_args.val_cache={replies}"]
    assert main([*run, *own, *first]) == 0
    learned = load_drafter(tmp_path / "run" / "drafter")
    moved = (tmp_path / "run").rename(tmp_path / "first")
    assert main([*run, *own, f"--model.init_args.init_from={moved / 'drafter'}"]) == 0
    second = load_drafter(tmp_path / "run" / "drafter")
    assert second.draft_ids().tolist() == learned.draft_ids().tolist()
    record = json.loads((tmp_path / "run" / "drafter" / "provenance.json").read_text())["config"]
    assert record["init_from"] == str(moved / "drafter")
    assert record["data"]["labelled_tokens"] == HiddenStateCache(replies).manifest.num_labelled
