"""Tokenized samples from any file this project writes or reads: replies with token ids, conversations, documents.

Owns: which kind a row is and how it becomes a sample. Does not know: caches, targets.
"""

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from draftsmith.data.formats import Message
from draftsmith.data.prompts import PROMPT_FILE, Prompt
from draftsmith.data.tokens import ChatTemplate, TokenizedSample, Turn, cut, from_turns, no_labels
from draftsmith.files import read_jsonl, sha256_file

RESPONSE_GLOB = "responses*.jsonl"


@dataclass(frozen=True)
class Skipped:
    """A sample that is not trained on, and why."""

    id: str
    reason: str


@dataclass(frozen=True)
class Survey:
    """What a corpus holds once it is cut to a length: `lengths` are the tokens of each sample kept, in order."""

    lengths: list[int]
    num_labelled: int
    num_cut: int
    skipped: list[Skipped]


class Corpus:
    """All samples of a source, read anew in each pass so that a large one need not fit in memory.

    Args:
        source: a JSONL file, or a folder that `data respond` or `data prompts` wrote.
        chat: makes the template when a row needs one; rows with token ids never do.
        split: keep the rows of this split only.
        max_length: samples are cut to this many tokens.

    Raises ValueError for a missing path, and later, with file and line, for rows that cannot be read.
    """

    def __init__(self, source: Path, chat: Callable[[], ChatTemplate], split: str | None, max_length: int) -> None:
        self.files = source_files(source)
        self.split = split
        self.max_length = max_length
        self._make_chat = chat
        self._chat: ChatTemplate | None = None

    @property
    def fingerprint(self) -> str:
        """sha256 over the files' contents, in order."""
        return hashlib.sha256("".join(sha256_file(file) for file in self.files).encode()).hexdigest()

    @property
    def mask_recipe(self) -> str:
        """How masks were found in the rows read so far."""
        return "token ids as generated" if self._chat is None else self._chat.mask_recipe

    def check_tokenizer(self, fingerprint: str) -> None:
        """Refuses replies in another tokenizer's ids. Raises ValueError naming both."""
        for file in self.files:
            own = (_run_settings(file) or {}).get("tokenizer_fingerprint", fingerprint)
            if own != fingerprint:
                raise ValueError(
                    f"{file} holds token ids of the tokenizer {own[:16]}, this target's is {fingerprint[:16]}; "
                    "make replies with this target"
                )

    def __iter__(self) -> Iterator[TokenizedSample]:
        """Samples that have something to train on, cut to `max_length`."""
        short = (cut(sample, self.max_length) for sample in self.all_samples())
        return (sample for sample in short if sample.num_labelled)

    def survey(self) -> Survey:
        """Reads everything once.

        Raises ValueError when the split is empty or no token at all is trained on, showing the first sample.
        """
        lengths: list[int] = []
        skipped: list[Skipped] = []
        num_labelled = num_cut = 0
        first: TokenizedSample | None = None
        for sample in self.all_samples():
            short = cut(sample, self.max_length)
            num_cut += short is not sample
            first = first or sample
            if short.num_labelled:
                lengths.append(len(short.input_ids))
                num_labelled += short.num_labelled
            else:
                skipped.append(Skipped(sample.id, _why_unlabelled(sample, self.max_length)))
        if first is None:
            raise ValueError(f"{self.files[0]} has no row in split {self.split!r}")
        if not lengths and skipped[0].reason.startswith("no token"):
            raise no_labels(first, self.chat.tokenizer)
        if not lengths:
            raise ValueError(f"no sample is left of {self.files[0]}: {skipped[0].id}: {skipped[0].reason}")
        return Survey(lengths, num_labelled, num_cut, skipped)

    @property
    def chat(self) -> ChatTemplate:
        """The template, made at its first use."""
        if self._chat is None:
            self._chat = self._make_chat()
        return self._chat

    def all_samples(self) -> Iterator[TokenizedSample]:
        """Every sample of the split, whole, whether it has something to train on or not."""
        for file in self.files:
            for line, row in read_jsonl(file):
                if self.split is None or row.get("split") == self.split:
                    yield self._sample(row, f"{file}:{line}", f"{file.stem}-{line}")

    def _sample(self, row: Mapping[str, Any], place: str, fallback_id: str) -> TokenizedSample:
        sample_id = str(row.get("id", fallback_id))
        try:
            turns = turns_of(row)
            if turns is not None:
                return from_turns(sample_id, turns)
            if isinstance(row.get("text"), str):
                return self.chat.document(sample_id, row["text"])
            return self.chat.conversation(sample_id, conversation_of(row))
        except (KeyError, TypeError) as error:
            raise ValueError(f"{place}: neither replies with token ids nor a conversation ({error!r})") from error
        except ValueError as error:
            raise ValueError(f"{place}: {error}") from error


def source_files(source: Path) -> list[Path]:
    """The files that a source stands for. Raises ValueError when there is none."""
    if source.is_dir():
        files = sorted(source.glob(RESPONSE_GLOB)) or sorted(source.glob(PROMPT_FILE))
        if not files:
            raise ValueError(
                f"{source} has neither {RESPONSE_GLOB} nor {PROMPT_FILE}; run `draftsmith data respond` first"
            )
        for file in files:
            _check_finished(file)
        _check_all_ranks(files)
        return files
    if not source.is_file():
        raise ValueError(f"no such file: {source}; check the path")
    return [source]


def _run_settings(file: Path) -> dict[str, Any] | None:
    """What `data respond` wrote beside its replies; None for any other file."""
    settings = file.with_name(file.name.replace("responses", "settings").replace(".jsonl", ".json"))
    if settings == file or not settings.is_file():
        return None
    found: dict[str, Any] = json.loads(settings.read_text(encoding="utf-8"))
    return found


def _check_finished(file: Path) -> None:
    """Refuses replies of a run that was stopped, whose rows are fewer than it set out to write."""
    settings = _run_settings(file)
    if settings is None:
        return
    planned = settings["num_rows"]
    with open(file, "rb") as lines:
        there = sum(1 for _ in lines)
    if there < planned:
        raise ValueError(
            f"{file} has {there} of {planned} replies; run the same `draftsmith data respond` again to finish it"
        )


def _check_all_ranks(files: list[Path]) -> None:
    """Refuses a folder to which some ranks have not written."""
    ranked = [file.stem.rpartition("-of-") for file in files if "-of-" in file.stem]
    if ranked and len(ranked) < int(ranked[0][2]):
        raise ValueError(
            f"{files[0].parent} has the replies of {len(ranked)} of {int(ranked[0][2])} ranks; run the others too"
        )


def turns_of(row: Mapping[str, Any]) -> list[Turn] | None:
    """Exchanges in token ids: `turns`, or one `prompt_ids` and `reply_ids`; None for a row without ids."""
    if "prompt_ids" in row and "reply_ids" in row:
        return [Turn(list(row["prompt_ids"]), list(row["reply_ids"]), str(row.get("finish", "")))]
    turns = row.get("turns")
    if not turns or not isinstance(turns[0], Mapping) or "reply_ids" not in turns[0]:
        return None
    return [Turn(list(t["prompt_ids"]), list(t["reply_ids"]), str(t["finish"])) for t in turns]


def conversation_of(row: Mapping[str, Any]) -> list[Message]:
    """A data set's own conversation: `messages` with assistant turns, or user turns and `reference` answers."""
    messages = [Message(role=str(m["role"]), content=str(m["content"])) for m in row["messages"]]
    if "reference" not in row:
        return messages
    prompt = Prompt(id="", messages=tuple(messages), split="", source="")
    conversation: list[Message] = []
    for turn, answer in zip(prompt.user_turns(), row["reference"], strict=False):
        conversation += [*turn, Message(role="assistant", content=str(answer))]
    return conversation or messages


def _why_unlabelled(sample: TokenizedSample, max_length: int) -> str:
    if sample.num_labelled:
        first = sample.loss_mask.index(True)
        return f"the assistant's first token is at {first}, past the {max_length} tokens a sample may have"
    return "no token is trained on"
