"""Whether a contender's replies are plain decoding's, token for token, and where they first are not.

Owns the comparison. Does not know who decoded; asks the target only how near a tie a difference was.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence

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


def num_places(differences: Iterable[Divergence]) -> int:
    """How many forwards `measured_gaps` makes: one for each prompt and position where both replies have a token."""
    return len({(each.prompt_id, each.position) for each in differences if _has_both_tokens(each)})


def _has_both_tokens(difference: Divergence) -> bool:
    return difference.plain_token is not None and difference.contender_token is not None


@torch.inference_mode()
def measured_gaps(
    differences: Iterable[Divergence],
    samples: Sequence[Sample],
    plain: Replies,
    target: Target,
    advance: Callable[[int], None] = lambda count: None,
) -> dict[Divergence, float]:
    """How far apart the target's logits of the two tokens are where replies differ.

    Meant for temperature 0, where a difference is a bug or a tie within rounding: the gap tells which.

    Args:
        differences: of one contender or of several, which are often at the same place: that is read once.
        samples: the prompts.
        plain: sample number -> plain decoding's replies, one a repeat.
        target: reads the prompt and plain decoding's reply up to there.
        advance: called with 1 after each place.

    Returns:
        The gap of each difference; those where a reply has ended have none.
    """
    numbers = {sample.id: number for number, sample in enumerate(samples)}
    places: dict[tuple[str, int], list[Divergence]] = {}
    for difference in filter(_has_both_tokens, differences):
        places.setdefault((difference.prompt_id, difference.position), []).append(difference)
    gaps: dict[Divergence, float] = {}
    for (prompt_id, position), here in places.items():
        number = numbers[prompt_id]
        ids = [*samples[number].prompt_ids, *plain[number][0][:position]]
        prompt_lengths = torch.tensor([len(samples[number].prompt_ids)], device=target.device)
        normed = target.prefix(torch.tensor([ids], device=target.device), read=prompt_lengths).normed[0, -1]
        logits = target.logits(normed).float()
        for difference in here:
            gaps[difference] = float(logits[difference.plain_token] - logits[difference.contender_token])
        advance(1)
    return gaps
