"""Several replies to one prompt."""

import json
from pathlib import Path

import pytest

from draftsmith.data.replies.reply_settings import SamplingOverrides
from draftsmith.data.replies.respond import respond
from draftsmith.decode.sampling import ReplyOptions


def replies(out: Path) -> dict[str, str]:
    """Token ids of the turns by id, as text that can be compared."""
    rows = [json.loads(line) for line in (out / "responses.jsonl").read_text().splitlines()]
    return {row["id"]: json.dumps(row["turns"]) for row in rows}


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    file = tmp_path / "prompts.jsonl"
    rows = [
        {"id": name, "messages": [{"role": "user", "content": f"word {name}"}], "split": "train", "source": "test"}
        for name in ("a", "b")
    ]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def test_each_sample_is_drawn_apart_and_the_first_is_that_of_a_run_with_one(
    tmp_path: Path, target: Path, prompts: Path
) -> None:
    short, warm = ReplyOptions(max_new_tokens=12), SamplingOverrides(temperature=1.0)
    respond(str(target), prompts, tmp_path / "one", reply=short, sampling=warm)
    respond(str(target), prompts, tmp_path / "three", reply=short, sampling=warm, samples=3)
    single, several = replies(tmp_path / "one"), replies(tmp_path / "three")
    assert sorted(several) == ["a", "a#2", "a#3", "b", "b#2", "b#3"]
    assert single == {"a": several["a"], "b": several["b"]}
    assert len(set(several.values())) == 6


@pytest.mark.parametrize(
    ("samples", "temperature", "rule"), [(2, 0.0, "they would all be equal"), (0, 1.0, "must be at least 1")]
)
def test_samples_that_would_be_equal_or_none_are_an_error(
    tmp_path: Path, target: Path, prompts: Path, samples: int, temperature: float, rule: str
) -> None:
    with pytest.raises(ValueError, match=rule):
        respond(
            str(target), prompts, tmp_path / "out", sampling=SamplingOverrides(temperature=temperature), samples=samples
        )
    assert not (tmp_path / "out" / "responses.jsonl").exists()
