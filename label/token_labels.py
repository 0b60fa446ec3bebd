"""From spans of characters to labels of tokens.

Owns this one shift, and how to get a tokenizer's offsets. 1 is correct, 0 is wrong, IGNORED is neither: no loss is
taken there. Knows nothing of files and stores. Dimension: N, the tokens of one response.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from transformers import PreTrainedTokenizerBase

from draftsmith.label.schema import Answer, Span, Tokens
from draftsmith.label.steps import first_number, is_step
from draftsmith.models.files.fingerprint import tokenizer_fingerprint

After = Literal["ignored", "wrong"]
StepRule = Literal["whole", "first-number", "last-token"]

CORRECT = 1
WRONG = 0
IGNORED = -100


def token_labels(
    answer: Answer, offsets: Sequence[Span], after: After = "ignored", step: StepRule = "whole"
) -> list[int]:
    """One label a token, as Judge Decoding masks them: 1 before the first error, 0 on it, `after` behind it.

    Worked example: "1+1=3, so 3" with the error (4, 5), cut into "1", "+", "1", "=3", ", so", " 3", gives 1, 1, 1, 0, IGNORED, IGNORED. A
    token that shares one character with the error is wrong ("=3" above). An empty token belongs to the side it is on. Other tokens that
    reach out of `checked` are ignored. So are all tokens of an answer that has no label, or whose error is unplaced.

    Args:
        answer: the answer with its label.
        offsets: each token's span in the response. Any tokenizer will do: spans are of characters, so a label made
            on one tokenizer's tokens holds for another's.
        after: what the tokens behind the error are. They continue from a mistake, so by default they are ignored.
        step: what of an error that is a step (see `draftsmith.label.steps.is_step`) is wrong: all of it, its first number, or its last
            token with a letter or digit. The rest of the step is then ignored: nobody has looked at it. So is a step without a number. The
            number of "Step 2:" or "2." counts steps, and is not meant.

    Raises:
        ValueError: `after` or `step` is another word, or no token touches the error (this tokenizer leaves those characters out).
    """
    if after not in ("ignored", "wrong"):
        raise ValueError(f"after is {after!r}; tokens behind the first error are 'ignored' or 'wrong'")
    if step not in ("whole", "first-number", "last-token"):
        raise ValueError(
            f"step is {step!r}; of a wrong step the 'whole', the 'first-number' or the 'last-token' is wrong"
        )
    label = answer.label
    if label is None or label.verdict == "unplaced":
        return [IGNORED] * len(offsets)
    first, last = label.checked or (0, len(answer.response))
    behind = WRONG if after == "wrong" else IGNORED
    labels = []
    for start, end in offsets:
        if label.error is not None and end > label.error[0] and start < label.error[1]:
            labels.append(WRONG)
        elif start < first or end > last:
            labels.append(IGNORED)
        else:
            labels.append(CORRECT if label.error is None or end <= label.error[0] else behind)
    if label.error is None:
        return labels
    if not any(_touch(span, label.error) for span in offsets):
        missed = answer.response[slice(*label.error)]
        raise ValueError(
            f"{answer.id}: no token touches the error {missed!r} at characters {list(label.error)}; this tokenizer leaves "
            "them out; mark the error on characters that it keeps, or leave the answer out"
        )
    return _narrowed(labels, answer.response, label.error, offsets, step)


def _narrowed(labels: list[int], response: str, error: Span, offsets: Sequence[Span], step: StepRule) -> list[int]:
    """The labels with less of a wrong step called wrong."""
    if step == "whole" or not is_step(response, error):
        return labels
    inside = [at for at, span in enumerate(offsets) if _touch(span, error)]
    # As on the labelling page: not the full stop or line break behind the last word.
    wrong = [at for at in inside if any(map(str.isalnum, response[slice(*offsets[at])]))][-1:] or inside[-1:]
    if step == "first-number":
        first = first_number(response, error)
        wrong = [] if first is None else [at for at in inside if _touch(offsets[at], first)]
    return [IGNORED if at in inside and at not in wrong else label for at, label in enumerate(labels)]


def tokenize(response: str, tokenizer: PreTrainedTokenizerBase) -> Tokens:
    """Cuts a response as a tokenizer does, without special tokens.

    Args:
        response: text.
        tokenizer: of a target.

    Raises:
        ValueError: the tokenizer does not say where its tokens are (it has no fast version).
    """
    if not tokenizer.is_fast:
        raise ValueError(
            f"the tokenizer {type(tokenizer).__name__} does not tell its tokens' offsets; use one with a tokenizer.json"
        )
    offsets = tokenizer(response, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
    return Tokens(tokenizer_fingerprint(tokenizer), tuple((int(start), int(end)) for start, end in offsets))


def _touch(span: Span, error: Span) -> bool:
    return max(span[0], error[0]) < min(span[1], error[1])
