"""Whether a contender's replies are plain decoding's, token for token, and where they first are not.

Owns the comparison. Does not know who decoded; asks the target only how near a tie a difference was.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch

from draftsmith.evaluate.records import Divergence, Sample
from draftsmith.models.target.target import Target

Replies = Mapping[int, Sequence[tuple[int, ...]]]


def first_difference(plain: Sequence[int], other: Sequence[int]) -> int | None:
    """Place of the first token in which two replies differ, a missing one included; None where they are equal.

    Example: `[5, 6, 7]` and `[5, 6]` differ at 2.
    """
    for place in range(max(len(plain), len(other))):
        if plain[place : place + 1] != other[place : place + 1]:
            return place
    return None


def compare(samples: Sequence[Sample], plain: Replies, other: Replies) -> tuple[float, tuple[Divergence, ...]]:
    """Whether each sample's replies equal plain decoding's first one.

    Args:
        samples: the prompts.
        plain, other: sample number -> replies, one a repeat. Samples that `other` did not decode do not count.

    Returns:
        the share of samples whose every reply is equal, and the first difference of each other sample.
    """
    divergences = []
    for number, replies in other.items():
        expected = plain[number][0]
        for reply in replies:
            place = first_difference(expected, reply)
            if place is not None:
                wanted = expected[place] if place < len(expected) else None
                got = reply[place] if place < len(reply) else None
                divergences.append(Divergence(samples[number].id, place, wanted, got))
                break
    return 1 - len(divergences) / len(other), tuple(divergences)


@torch.inference_mode()
def with_gaps(
    divergences: Sequence[Divergence], samples: Sequence[Sample], plain: Replies, target: Target, most: int = 20
) -> tuple[Divergence, ...]:
    """The first `most` differences, each with how far apart the target's logits of the two tokens are.

    Meant for temperature 0, where a difference is a bug or a tie within rounding: the gap tells which.
    """
    numbers = {sample.id: number for number, sample in enumerate(samples)}
    measured = []
    for difference in divergences[:most]:
        if difference.plain_token is not None and difference.contender_token is not None:
            number = numbers[difference.prompt_id]
            ids = [*samples[number].prompt_ids, *plain[number][0][: difference.position]]
            prompt_lengths = torch.tensor([len(samples[number].prompt_ids)], device=target.device)
            normed = target.prefix(torch.tensor([ids], device=target.device), read=prompt_lengths).normed[0, -1]
            logits = target.logits(normed).float()
            difference = replace(
                difference, gap=float(logits[difference.plain_token] - logits[difference.contender_token])
            )
        measured.append(difference)
    return tuple(measured)
