"""What can generate replies: two interfaces, and the bundled decoder behind one of them.

Owns: those interfaces. Does not know: prompts' files, batches, resuming, what serves elsewhere (`server_source.py`, `vllm_source.py`).
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, runtime_checkable

from transformers import PreTrainedTokenizerBase

from draftsmith.decode.engine import Engine
from draftsmith.decode.runners import Compile
from draftsmith.decode.sampling import GenerationSettings
from draftsmith.models.drafters.drafter_folder import load_drafter
from draftsmith.models.drafters.other_layouts import TargetBond
from draftsmith.models.files.fingerprint import tokenizer_fingerprint
from draftsmith.models.target.target import Target
from draftsmith.models.tree.limits import DraftLimits


@dataclass(frozen=True)
class Reply:
    """One generated reply.

    Attributes:
        token_ids: with the end token if it was produced.
        finish: why it ended: `eos`, `stop` or `length`.
    """

    token_ids: list[int]
    finish: str


class ResponseEngine(Protocol):
    """Whatever can generate: the bundled decoder here, a serving engine elsewhere."""

    def reply(self, prompts: list[list[int]], settings: GenerationSettings, request_ids: list[int]) -> list[Reply]:
        """Reply to each prompt, in order, each reply within the model's context.

        A reply must depend on its prompt, the settings and its request id alone, not on its neighbours in the batch.
        Otherwise a run that was killed would not continue to the same replies.

        Args:
            prompts: token ids.
            settings: of generation.
            request_ids: which noise each prompt draws.

        Returns:
            One reply a prompt.
        """


@runtime_checkable
class RefillingEngine(Protocol):
    """Whatever answers some prompts at once and lets others take the rows of those that have ended."""

    def stream(
        self, requests: Iterator[tuple[int, list[int]]], settings: GenerationSettings, num_rows: int, room: int
    ) -> Iterator[tuple[int, Reply]]:
        """Reply to prompts as rows become free. A reply depends on its prompt, the settings and its request id alone.

        Args:
            requests: (request id, token ids) of each. It is asked again after every reply, also where it had none left before.
            settings: of generation.
            num_rows: how many prompts are answered at once.
            room: tokens that a prompt and its reply may have.

        Yields:
            Which of the requests was answered, counted from 0, and the reply.
        """


class Unanswered(Exception):
    """One request got no answer, however often it was asked. The others may do better.

    Args:
        reason: why.
        attempts: after how many.
    """

    def __init__(self, reason: str, attempts: int) -> None:
        super().__init__(f"{reason} ({attempts} attempts)")
        self.reason, self.attempts = reason, attempts


class BadReply(ValueError):
    """A reply that cannot be the target's. The first one says that the engine is set up wrong, one among many good ones only itself."""


@dataclass(frozen=True)
class RawReply:
    """The answer of another engine.

    Attributes:
        token_ids: as it generated them.
        finish: its own word for why it stopped.
    """

    token_ids: list[int]
    finish: str


@runtime_checkable
class IndependentEngine(Protocol):
    """An engine that batches by itself: it is kept busy with many single requests, and none waits for another's end.

    Attributes:
        concurrency: how many requests it takes at once.
    """

    concurrency: int

    def ask(self, prompt: list[int], settings: GenerationSettings, request_id: int) -> RawReply:
        """Reply to one prompt; called from up to `concurrency` threads at once. The reply depends on the arguments alone.

        Args:
            prompt: token ids.
            settings: of generation.
            request_id: which noise the prompt draws.

        Returns:
            A reply of at most `budget` tokens.

        Raises:
            Unanswered: this request got no answer.
            BadReply: the reply to this request cannot be the target's.
            ValueError: no request can go well.
        """

    def budget(self, prompt: list[int], settings: GenerationSettings) -> int:
        """How many tokens the reply to a prompt may have: what was asked for, within the engine's context.

        Args:
            prompt: token ids.
            settings: of generation.

        Returns:
            Tokens.
        """

    def close(self) -> None:
        """End what is under way; a request that waits raises Unanswered."""


class BundledEngine:
    """The bundled decoder as a response engine; the replies are the same with a drafter as without.

    Args:
        target: the model that replies.
        drafter: the folder of a trained drafter.
        limits: how much it drafts; by default as :class:`Engine` has it.
        tokenizer: the target's.
        trust_remote_code: whether Python files that come with a draft LM may run.
        compile: how cycles are run; see :class:`~draftsmith.decode.engine.Engine`.

    Raises:
        ValueError: the drafter belongs to another target or tokenizer.
    """

    def __init__(
        self,
        target: Target,
        drafter: Path | None = None,
        limits: DraftLimits | None = None,
        tokenizer: PreTrainedTokenizerBase | None = None,
        trust_remote_code: bool = False,
        compile: Compile = "auto",
    ) -> None:
        loaded = None
        if drafter is not None:
            bond = TargetBond(target.ends, "" if tokenizer is None else tokenizer_fingerprint(tokenizer))
            loaded = load_drafter(drafter, str(target.dtype).removeprefix("torch."), trust_remote_code, target=bond)
        if loaded is not None:
            loaded.to_decode(target.device)
        self._engine = Engine(target, loaded, limits, tokenizer, compile=compile)

    def reply(self, prompts: list[list[int]], settings: GenerationSettings, request_ids: list[int]) -> list[Reply]:
        """See `ResponseEngine.reply`."""
        generations = self._engine.generate(prompts, settings, request_ids=request_ids)
        return [Reply(generation.token_ids, generation.finish) for generation in generations]

    def stream(
        self, requests: Iterator[tuple[int, list[int]]], settings: GenerationSettings, num_rows: int, room: int
    ) -> Iterator[tuple[int, Reply]]:
        """See `RefillingEngine.stream`."""
        for index, generation in self._engine.stream(requests, settings, num_rows, room):
            yield index, Reply(generation.token_ids, generation.finish)
