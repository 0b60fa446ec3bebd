"""The command `draftsmith data verify`: samples of a cache run through the target again and compared.

Owns: which samples, what counts as equal, what is printed. Does not know: how a cache is made.

Shape legend: T tokens, D hidden.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated

import torch

from draftsmith.arguments import FLAT
from draftsmith.data.cache.features import features, num_embeddings
from draftsmith.data.cache.reader import Check, HiddenStateCache
from draftsmith.data.chats.tokenized_samples import TokenizedSample
from draftsmith.data.shards.eight_bit import CODES, LARGEST_ERROR, stored_dtype
from draftsmith.escapes import visible
from draftsmith.models.target.options import PlacementOptions
from draftsmith.models.target.target import Target

_TOLERANCE = 0.02
ANYWHERE = PlacementOptions()


@dataclass(frozen=True)
class Comparison:
    """A cached sample against its recomputation.

    Attributes:
        sample: its id.
        layer: the layer's name.
        max_difference: the largest of a single number.
        relative_difference: the largest of a token's state relative to that state's length.
        greedy_agreement: the share of equal greedy tokens (1 where none are stored).
    """

    sample: str
    layer: str
    max_difference: float
    relative_difference: float
    greedy_agreement: float


def verify(
    cache: Path,
    target: str | None = None,
    samples: int = 8,
    seed: int = 0,
    tolerance: float | None = None,
    check: Check = "open",
    where: Annotated[PlacementOptions, FLAT] = ANYWHERE,
) -> None:
    """Checks a cache: every shard's sha256, all states for NaN, and some samples by running them through the target again.

    The target runs in the dtype that it ran in when the cache was made. Revision and quantization are those that the cache names,
    unless you give others.

    Args:
        cache: The folder of the cache.
        target: Path or hub id; default: the one the cache names.
        samples: How many samples to recompute, drawn at random.
        seed: Another seed draws others.
        tolerance: Largest allowed distance of a state from its recomputation, relative to the state's length; default: 0.02, and with
            eight bits 0.09.
        check: Whether shards are hashed and all states read first (`open`), as they are touched (`lazy`), or not (`off`).
        where: Where the target runs; see `PlacementOptions`.

    Raises:
        ValueError: the cache is missing, damaged or another target's, or a state differs from its recomputation.
    """
    if samples < 1:
        raise ValueError(f"samples is {samples}; recompute at least 1")
    opened = HiddenStateCache(cache, check=check)
    identity = opened.manifest.identity
    where = replace(where, quantization=where.quantization or identity.target_quantization)
    if target is None:
        target, where = identity.target, replace(where, revision=where.revision or identity.target_revision)
    loaded = where.load(target, identity.target_dtype)
    opened.check_target(loaded.fingerprint, where.quantization, num_embeddings(loaded))
    if check == "open":
        opened.verify_states()
    allowed = tolerance
    if allowed is None:
        allowed = _TOLERANCE + (LARGEST_ERROR if stored_dtype(identity.dtype) == CODES else 0.0)
    compared = list(compare(opened, loaded, samples, seed))
    _print_compared(compared, with_greedy=identity.local_horizon > 0)
    least_agreement = 1 - (_TOLERANCE if tolerance is None else tolerance)
    wrong = [
        row for row in compared if not row.relative_difference <= allowed or row.greedy_agreement < least_agreement
    ]
    if wrong:
        raise ValueError(
            f"{cache}: {len(wrong)} of {len(compared)} comparisons differ by more than {allowed:.3g} "
            f"(first: {wrong[0].sample}, {wrong[0].layer}, {wrong[0].relative_difference:.3e}); "
            "the cache does not hold this target's states"
        )
    print(f"{cache}: {min(samples, len(opened))} samples recomputed, all within {allowed:.3g}")


def _print_compared(compared: Iterable[Comparison], with_greedy: bool) -> None:
    for row in compared:
        differences = f"max difference {row.max_difference:.3e}  relative {row.relative_difference:.3e}"
        greedy = f"  greedy tokens equal {row.greedy_agreement:.1%}" if with_greedy else ""
        print(visible(f"{row.sample}  {row.layer}  {differences}{greedy}"))


def compare(cache: HiddenStateCache, target: Target, num_samples: int, seed: int) -> Iterator[Comparison]:
    """Recompute randomly drawn samples, one forward each; states of eight bits are compared with whole ones.

    Args:
        cache: with the target's states.
        target: the model.
        num_samples: how many to draw.
        seed: of the draw.

    Yields:
        A comparison for each sample and layer.
    """
    generator = torch.Generator().manual_seed(seed)
    chosen = torch.randperm(len(cache), generator=generator)[:num_samples].tolist()
    identity = cache.manifest.identity
    if stored_dtype(identity.dtype) == CODES:
        identity = replace(identity, dtype="float32")
    for index in chosen:
        sample = cache[index]
        text = TokenizedSample(sample.id, sample.input_ids.tolist(), sample.loss_mask.tolist())
        again = features(target, [text], identity)
        agreement = 1.0
        if sample.greedy_ids is not None and again.greedy_ids is not None:
            agreement = float((sample.greedy_ids == again.greedy_ids).float().mean())
        for layer in identity.layers:
            stored_TD, fresh_TD = sample.hidden[layer].float(), again.hidden[layer].float()
            difference_TD = stored_TD - fresh_TD
            relative_T = difference_TD.norm(dim=-1) / fresh_TD.norm(dim=-1).clamp_min(1e-12)
            yield Comparison(sample.id, layer, float(difference_TD.abs().max()), float(relative_T.max()), agreement)
