"""Whether an answer can become a row of token ids, and why not.

Owns the reasons, for `label rows`, which leaves such answers out, and for `label serve`, which does not offer them. Knows no store and no
row. Dimension: N, the tokens of one response.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from draftsmith.data.chat_template import ChatTemplate
from draftsmith.label.schema import Answer, Label, Span
from draftsmith.label.token_labels import tokenize

UNPLACED = "wrong, but nobody has said where"
SILENT = "no token is left that a label speaks of"
TOO_LONG = "longer than the target's context"
UNTOUCHED = "no token of this tokenizer touches the error"
REFUSED = "the template fails on the prompt"


class LeftOut(ValueError):
    """An answer that gives no row.

    Attributes:
        item_id: of the answer.
        reason: one of the reasons above.
        detail: which answer, and what is the matter with it.
    """

    def __init__(self, item_id: str, reason: str, detail: str | None = None) -> None:
        super().__init__(f"{detail or item_id}: {reason}")
        self.item_id, self.reason, self.detail = item_id, reason, detail or item_id


@dataclass(frozen=True)
class RowChecks:
    """What one target can read.

    Attributes:
        tokenizer: the target's.
        chat: the target's chat template.
        max_length: the most tokens of prompt and response; None sets no limit.
    """

    tokenizer: PreTrainedTokenizerBase
    chat: ChatTemplate
    max_length: int | None = None

    def token_ids(self, answer: Answer) -> tuple[list[int], list[int]]:
        """The ids of prompt and response, as the target reads them.

        Args:
            answer: its label does not matter.

        Raises:
            LeftOut: the template fails, or there are too many tokens.
        """
        reply_ids = [int(token) for token in self.tokenizer(answer.response, add_special_tokens=False)["input_ids"]]
        try:
            prompt_ids = self.chat.first_prompt_ids(answer.messages)
        except ValueError as error:
            raise LeftOut(answer.id, REFUSED, f"{answer.id}: {error}") from error
        length = len(prompt_ids) + len(reply_ids)
        if self.max_length is not None and length > self.max_length:
            raise LeftOut(answer.id, TOO_LONG, f"{answer.id}, {length} of {self.max_length} tokens")
        return prompt_ids, reply_ids

    def why_not(self, answer: Answer, imported: Sequence[Label] = ()) -> LeftOut | None:
        """Why a person need not look at an answer: whatever they mark on it, it gives no row. None where they can help.

        Args:
            answer: that waits for a label.
            imported: labels of it that a person is asked to refine.
        """
        try:
            self.token_ids(answer)
        except LeftOut as reason:
            return reason
        offsets = tokenize(answer.response, self.tokenizer).offsets
        if not any(start < end for start, end in offsets):
            return LeftOut(answer.id, SILENT)
        for label in imported:
            if label.error is not None and not touches(offsets, label.error):
                return LeftOut(answer.id, UNTOUCHED)
        return None


def touches(offsets: Sequence[Span], error: Span) -> bool:
    """Whether a token touches an error.

    Args:
        offsets: N spans of tokens.
        error: a span.
    """
    return any(max(start, error[0]) < min(end, error[1]) for start, end in offsets)
