"""Prompts and replies for distilling a draft LM: which rows a step sees, and which of them the draft LM continues itself.

Owns: reading and encoding, the held-out rows, the mixture of on-policy rows and the target's own replies, where a run resumes.
Does not know: models, losses, how a continuation is sampled.

Shape legend: N rows, L tokens of all rows.
"""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytorch_lightning as pl
import torch
from pytorch_lightning.utilities import rank_zero_info
from torch.utils.data import DataLoader, Dataset
from transformers import PreTrainedTokenizerBase

from draftsmith.data.chat_template import ChatTemplate
from draftsmith.data.chats.reply_marks import ReplyMarks
from draftsmith.data.chats.token_kinds import EVERYTHING, KindCounts, TrainedOn
from draftsmith.data.chats.tokenized_samples import cut
from draftsmith.data.corpus import Corpus
from draftsmith.data.progress import progress
from draftsmith.data.prompt_ids import chat_for, first_prompt_ids
from draftsmith.data.prompts import PROMPT_FILE, read_prompts
from draftsmith.files import sha256_file
from draftsmith.json_rows import Dropped, summary
from draftsmith.models.files.fingerprint import tokenizer_fingerprint
from draftsmith.models.target.prompt_template import TemplateOptions, rendering_fingerprint
from draftsmith.train.batches.epoch_sampler import EpochSampler
from draftsmith.train.batches.labelled_text import COUNTED_SAMPLES, LabelledText
from draftsmith.train.batches.resumed import check_same, saved_place
from draftsmith.train.draft_lm.texts import DistilText, TextBatch, TextStore


class DistilDataModule(pl.LightningDataModule):
    """Training and validation rows of a draft LM: prompts, and the target's replies.

    An epoch uses every row once. The draft LM itself answers a share `on_policy` of the rows, and uses only their prompts. On the others
    it learns along the target's own reply. Each epoch draws anew which rows are on-policy, always the same number. A prompt without a
    reply is always on-policy. What is trained on holds for both: a reply that the draft LM samples has thoughts and tool calls too.

    Args:
        replies: the target's own replies: a folder or JSONL that `draftsmith data respond` wrote.
        prompts: more prompts, or all of them: a folder or JSONL that `draftsmith data prompts` wrote. The run skips prompts that
            `replies` answers.
        on_policy: share of an epoch's rows that the draft LM answers itself.
        split: read the rows of this split only; null for all.
        val_fraction: share of the rows held out, at least one.
        max_val_rows: hold out at most this many; null for no limit. The target answers each one without a reply.
        max_length: cut texts to this many tokens. The run skips and counts empty replies and prompts that leave no room for a reply.
        batch_size: rows of a step on each process, on average; the batches of an epoch are nearly equal.
        max_samples: train on at most this many rows (the same ones with the same seed).
        template: Jinja file, or `none` for plain text; null takes the tokenizer's own. Replies with token ids need none.
        shuffle: a new order every epoch.
        seed: fixes the held-out rows, every epoch's order, and which rows are on-policy.
        template_name: which of a tokenizer's several chat templates to use; null: the one called default.
        template_args: variables of the chat template, such as {enable_thinking: false}.
        train_replies: train on the words of replies.
        train_tool_calls: train on tool calls.
        train_thoughts: train on thoughts.
        last_turn_only: train on the last assistant turn of each conversation alone; an on-policy row then answers the last turn.

    Raises:
        ValueError: settings out of range, or that train on nothing; when reading, rows of another tokenizer, nothing left to train on,
            more prompts without a reply than `on_policy` has room for, or no chat template where only some kinds are trained on.
    """

    def __init__(
        self,
        replies: Path | None = None,
        prompts: Path | None = None,
        on_policy: float = 1.0,
        split: str | None = None,
        val_fraction: float = 0.02,
        max_val_rows: int | None = 512,
        max_length: int = 1024,
        batch_size: int = 16,
        max_samples: int | None = None,
        template: str | None = None,
        shuffle: bool = True,
        seed: int = 0,
        template_name: str | None = None,
        template_args: dict[str, Any] | None = None,
        train_replies: bool = True,
        train_tool_calls: bool = True,
        train_thoughts: bool = True,
        last_turn_only: bool = False,
    ) -> None:
        super().__init__()
        if replies is None and prompts is None:
            raise ValueError(
                "neither replies nor prompts are given; give the folder of `data respond` or `data prompts`"
            )
        _check_shares(on_policy, val_fraction)
        check_counts(max_val_rows=max_val_rows, max_length=max_length, batch_size=batch_size, max_samples=max_samples)
        self.replies = None if replies is None else Path(replies)
        self.prompts = None if prompts is None else Path(prompts)
        self.on_policy, self.split = on_policy, split
        self.val_fraction, self.max_val_rows = val_fraction, max_val_rows
        self.max_length, self.batch_size, self.max_samples = max_length, batch_size, max_samples
        self.template, self.shuffle, self.seed = template, shuffle, seed
        self.rendering = TemplateOptions(template_name, template_args)
        self.trained_on = TrainedOn(
            train_replies=train_replies,
            train_tool_calls=train_tool_calls,
            train_thoughts=train_thoughts,
            last_turn_only=last_turn_only,
        )
        self.store = TextStore()
        self.train_rows = np.empty(0, dtype=np.int64)
        self.val_rows = np.empty(0, dtype=np.int64)
        self.sources: dict[str, str] = {}
        self.num_left_out = 0
        self.counts = KindCounts()
        self._marks: ReplyMarks | None = None
        self._dropped: list[Dropped] = []
        self._answered: set[bytes] = set()
        self._epoch, self._start = 0, 0
        self._template = ""
        self._drawn: tuple[int, np.ndarray] | None = None

    def read(
        self,
        tokenizer: PreTrainedTokenizerBase,
        context: int | None,
        eos_ids: Iterable[int],
        vocab_size: int | None = None,
    ) -> None:
        """Reads and encodes everything; the training module calls this once it knows the models.

        Args:
            tokenizer: the target's, which is the draft LM's as well.
            context: the shorter of the two models' contexts in tokens, None for no limit.
            eos_ids: tokens that end a reply.
            vocab_size: replies with token ids that are not below this are left out.

        Raises:
            ValueError: rows of another tokenizer, nothing left to train on, or no chat template where only some kinds of tokens are
                trained on.
        """
        if len(self.store):
            return
        self.max_length = self.max_length if context is None else min(self.max_length, context)
        self._template = rendering_fingerprint(tokenizer, self.template, self.rendering)
        if self.trained_on.kinds != EVERYTHING.kinds:
            self._marks = ChatTemplate(tokenizer, self.template, eos_ids, self.rendering).marks
        if self.replies is not None:
            self._read_replies(self.replies, tokenizer, eos_ids, vocab_size)
        if self.prompts is not None:
            self._read_prompts(self.prompts, tokenizer, eos_ids)
        self._answered.clear()
        if self._dropped:
            rank_zero_info(summary(self._dropped))
        if self.num_left_out:
            rank_zero_info(
                f"{self.num_left_out} row(s) left out: no reply to train on in them, or no room for one within max_length {self.max_length}"
            )
        order = torch.randperm(len(self.store), generator=torch.Generator().manual_seed(self.seed)).numpy()
        held_out = self._num_held_out()
        self.val_rows = np.sort(order[:held_out])
        self.train_rows = np.sort(order[held_out:][: self.max_samples])
        if not len(self.train_rows):
            raise ValueError(
                f"{summary(self._dropped)}; {len(self.store)} usable row(s) in {', '.join(self.sources)}, split {self.split} "
                f"({self.num_left_out} hold no reply to train on, or leave no room for one within max_length {self.max_length}): "
                "none is left to train on; add rows, or raise max_length"
            )
        choose_on_policy(self._with_reply(), self.on_policy, self.seed, 0)

    def _num_held_out(self) -> int:
        if not self.val_fraction or not len(self.store):
            return 0
        wanted = max(1, round(self.val_fraction * len(self.store)))
        return wanted if self.max_val_rows is None else min(wanted, self.max_val_rows)

    def _read_replies(
        self, source: Path, tokenizer: PreTrainedTokenizerBase, eos_ids: Iterable[int], vocab_size: int | None
    ) -> None:
        corpus = Corpus(
            source,
            lambda: ChatTemplate(tokenizer, self.template, eos_ids, self.rendering),
            self.split,
            max_length=self.max_length,
            vocab_size=vocab_size,
            trained_on=self.trained_on,
        )
        corpus.check_tokenizer(tokenizer_fingerprint(tokenizer))
        with progress(f"tokenize {source}", None, "samples", brief=True) as advance:
            for sample in corpus.all_samples(self._dropped):
                advance(1)
                short, num_prompt = cut(sample, self.max_length), sample.num_prompt
                if short.num_labelled and num_prompt:
                    self.counts.add(short.counts)
                    self.store.add(short.input_ids, short.loss_mask, num_prompt)
                    if self.prompts is not None:
                        self._answered.add(_digest(sample.input_ids[: sample.num_asked]))
                else:
                    self.num_left_out += 1
        self.sources[str(source)] = corpus.fingerprint

    def _read_prompts(self, source: Path, tokenizer: PreTrainedTokenizerBase, eos_ids: Iterable[int]) -> None:
        prompts = read_prompts(source, self.split, self._dropped)
        chat = chat_for(prompts, tokenizer, self.template, eos_ids, self.rendering)
        for prompt in prompts:
            try:
                ids = first_prompt_ids(prompt, chat)
            except ValueError as error:
                self._dropped.append(Dropped(prompt.place, str(error), id=prompt.id))
                continue
            if _digest(ids) in self._answered:  # its reply is a row already, and may be held out
                continue
            if 0 < len(ids) < self.max_length:
                self.store.add(ids, None)
            else:
                self.num_left_out += 1
        self.sources[str(source)] = sha256_file(source / PROMPT_FILE if source.is_dir() else source)

    def answered(self, text: DistilText, reply_ids: Sequence[int]) -> DistilText:
        """A row with a reply that a model has just written, trained on as the run's choice says.

        Args:
            text: the row.
            reply_ids: token ids of the reply.
        """
        labelled = None
        if self._marks is not None:
            kinds = self._marks.kinds(text.prompt_ids, reply_ids)
            labelled = [kind in self.trained_on.kinds for kind in kinds]
        return text.with_reply(reply_ids, self.max_length, labelled)

    def is_on_policy(self, number: int, epoch: int) -> bool:
        """Whether the draft LM continues this row itself in an epoch.

        Args:
            number: of the row.
            epoch: its number.
        """
        if self._drawn is None or self._drawn[0] != epoch:
            drawn = np.zeros(len(self.store), dtype=bool)
            drawn[self.train_rows] = choose_on_policy(self._with_reply(), self.on_policy, self.seed, epoch)
            self._drawn = epoch, drawn
        return bool(self._drawn[1][number])

    def labelled_text(self, vocab_size: int) -> LabelledText:
        """The target's replies among the rows to train on; the draft LM's own are not known before it samples them."""
        with_reply = self._with_reply()
        counts = torch.zeros(vocab_size, dtype=torch.int64)
        step = max(1, len(self.train_rows) // COUNTED_SAMPLES)
        counted = self.train_rows[::step]
        for number in counted[with_reply[::step]]:
            text = self.store.text(number)
            labelled = torch.tensor(text.ids)[torch.tensor(text.labelled)]
            counts.scatter_add_(0, labelled, torch.ones_like(labelled))
        on_policy = int(choose_on_policy(with_reply, self.on_policy, self.seed, 0).sum())
        remarks = []
        if self.counts.read or len(self.counts.trained) > 1:
            remarks.append(f"the target's replies, held-out rows included: {self.counts.words}")
        if on_policy:
            remarks.append(
                f"the draft LM answers {on_policy} of these rows itself in each epoch, and learns from its own tokens there"
            )
        unanswered = int((~self.store.with_reply()[self.val_rows]).sum())
        if unanswered:
            remarks.append(
                f"the first validation also lets the target answer {unanswered} held-out prompts that have no reply"
            )
        size = len(self.train_rows)
        return LabelledText(counts, size, len(counted), "rows", remarks=tuple(remarks))

    def val_prompts(self, num_prompts: int) -> list[list[int]]:
        """Token ids of the first held-out prompts.

        Args:
            num_prompts: at most this many.
        """
        texts = [self.store.text(number) for number in self.val_rows[:num_prompts]]
        return [text.prompt_ids for text in texts]

    def train_dataloader(self) -> DataLoader:
        """Batches of this rank, from where a resumed run stopped."""
        return self._loader(self.train_rows, self.shuffle, self._epoch, self._start)

    def val_dataloader(self) -> DataLoader | list:
        """Batches of the held-out rows in a fixed order; none when nothing is held out.

        Raises:
            ValueError: fewer held-out rows than processes.
        """
        if 0 < len(self.val_rows) < self._world()[1]:
            raise ValueError(
                f"val_fraction {self.val_fraction} (max_val_rows {self.max_val_rows}) holds out {len(self.val_rows)} row(s), and each of "
                f"{self._world()[1]} processes needs one; raise them, or set val_fraction to 0"
            )
        return self._loader(self.val_rows, False, 0, 0) if len(self.val_rows) else []

    def state_dict(self) -> dict[str, Any]:
        """Where in the data the run is; saved in every checkpoint."""
        assert self.trainer is not None
        return saved_place(self.trainer, self._layout())

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Called on resume, before the loaders are made.

        Args:
            state_dict: from `state_dict` of the interrupted run.

        Raises:
            ValueError: the rows, their order or the batches differ from those of the interrupted run.
        """
        own = self._layout()
        # Checkpoints of earlier versions tell neither split nor template, the number of tokens, nor what is trained on.
        check_same(own, {**own, **state_dict["layout"]}, "resume with the same data")
        self._epoch, self._start = divmod(state_dict["batches_done"], state_dict["batches_per_epoch"])

    def _layout(self) -> dict[str, Any]:
        return {
            "source": hashlib.sha256("".join(self.sources.values()).encode()).hexdigest(),
            "split": self.split,
            "template": self._template,
            "max_length": self.max_length,
            "rows": len(self.train_rows),
            "tokens": self.store.num_tokens,
            "batch_size": self.batch_size,
            "on_policy": self.on_policy,
            "trained_on": self.trained_on.as_text,
            "shuffle": self.shuffle,
            "seed": self.seed,
            "world_size": self._world()[1],
        }

    def _with_reply(self) -> np.ndarray:
        return self.store.with_reply()[self.train_rows]

    def _world(self) -> tuple[int, int]:
        trainer = self.trainer
        return (0, 1) if trainer is None else (trainer.global_rank, trainer.world_size)

    def _loader(self, rows: np.ndarray, shuffle: bool, epoch: int, start: int) -> DataLoader:
        rank, world_size = self._world()
        # Each row counts as one token of the plan's budget.
        sampler = EpochSampler(
            np.ones(len(rows), dtype=np.int64),
            self.batch_size,
            seed=self.seed,
            shuffle=shuffle,
            rank=rank,
            world_size=world_size,
            epoch=epoch,
            start=start,
        )
        return DataLoader(_Subset(self.store, rows), batch_size=None, sampler=sampler)


def _check_shares(on_policy: float, val_fraction: float) -> None:
    if not 0.0 <= on_policy <= 1.0:
        raise ValueError(f"on_policy is {on_policy}; it is a share of the rows, between 0 and 1")
    if not 0.0 <= val_fraction < 1.0:
        raise ValueError(f"val_fraction is {val_fraction}; it must be at least 0 and below 1")


def check_counts(**counts: int | None) -> None:
    """Checks numbers of rows or tokens.

    Args:
        counts: by the name of their setting; None is a default or no limit.

    Raises:
        ValueError: a number below 1.
    """
    for name, count in counts.items():
        if count is not None and count < 1:
            raise ValueError(f"{name} is {count}; it must be at least 1")


def _digest(ids: Sequence[int]) -> bytes:
    """16 bytes that identify a prompt, however long it is."""
    return hashlib.blake2b(array("i", ids).tobytes(), digest_size=16).digest()


class _Subset(Dataset):
    def __init__(self, store: TextStore, rows: np.ndarray) -> None:
        self._store, self._rows = store, rows

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, places: Sequence[int]) -> TextBatch:
        return self._store[self._rows[places].tolist()]


def choose_on_policy(with_reply: Sequence[bool] | np.ndarray, share: float, seed: int, epoch: int) -> np.ndarray:
    """Which rows of an epoch the draft LM continues itself. Rows without a reply come first.

    Example: of four rows with replies and a share of 0.5, two, and in another epoch perhaps others.

    Args:
        with_reply: bool [N], whether a row has a reply.
        share: of the rows, from 0 to 1.
        seed: of the choice.
        epoch: its number; each epoch chooses anew.

    Returns:
        bool [N].

    Raises:
        ValueError: more rows without a reply than the share has room for.
    """
    chosen = ~np.asarray(with_reply, dtype=bool)
    wanted = round(share * len(chosen))
    if chosen.sum() > wanted:
        raise ValueError(
            f"on_policy is {share}, which of {len(chosen)} rows is {wanted}, and {chosen.sum()} rows are prompts without a reply; raise "
            "on_policy, or let the target answer them (`draftsmith data respond`)"
        )
    free = np.flatnonzero(~chosen)
    rng = np.random.default_rng([seed, epoch])
    chosen[rng.permutation(free)[: wanted - chosen.sum()]] = True
    return chosen
