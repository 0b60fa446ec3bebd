"""The target's forward over samples: its chosen layers, token after token, without padding.

Owns: length buckets, the overlap of copying and computing, and the check that states are finite. Does not
know: files.

Shape legend: B rows of a forward, T tokens, D hidden, G greedy tokens a position.
"""

import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from draftsmith.data.cache.engine_states import StatesSource
from draftsmith.data.chats.tokenized_samples import TokenizedSample
from draftsmith.data.shards.eight_bit import CODES, quantise, stored_dtype
from draftsmith.data.shards.manifest import CacheIdentity
from draftsmith.data.shards.shards import ShardContent
from draftsmith.decode.greedy_continuations import greedy_continuations
from draftsmith.models.target.target import Target, TargetEnds


@dataclass(frozen=True)
class _Forward:
    """A forward whose states may still be on their way to the host.

    Attributes:
        rows: numbers of its samples.
        states: layer name -> [B, T, D].
        scales: layer name -> float32 [B, T], of states with eight bits.
        greedy_BTG: int32, or None.
        arrived: events; the states are on the host after all of them.
    """

    rows: list[int]
    states: dict[str, Tensor]
    scales: dict[str, Tensor]
    greedy_BTG: Tensor | None
    arrived: list[torch.cuda.Event]


@torch.inference_mode()
def features(
    target: Target,
    samples: Sequence[TokenizedSample],
    identity: CacheIdentity,
    advance: Callable[[int], None] = lambda tokens: None,
) -> ShardContent:
    """Compute the states of some samples, end to end.

    Samples of similar length share a forward. On a GPU the copy to the host runs behind the next forward.

    Args:
        target: the model.
        samples: in tokens.
        identity: of the cache: layers, stored dtype, greedy tokens, tokens of a forward.
        advance: takes how many more tokens are done.

    Returns:
        Tensors of a shard: `hidden[layer]` is [sum of lengths, D] in the stored dtype, with `scales`.

    Raises:
        ValueError: a state is not finite, with sample, layer and position; or a token id is outside the target's vocabulary.
    """
    content = _empty_content(samples, identity)
    _check_vocabulary(content, target)
    waiting: _Forward | None = None
    for rows in length_batches([len(sample.input_ids) for sample in samples], identity.batch_tokens):
        launched = _launch(target, [samples[row] for row in rows], rows, identity)
        if waiting is not None:
            advance(_store(waiting, content))
        waiting = launched
    if waiting is not None:
        advance(_store(waiting, content))
    return content


@torch.inference_mode()
def features_of_engine(
    source: StatesSource,
    samples: Sequence[TokenizedSample],
    identity: CacheIdentity,
    advance: Callable[[int], None] = lambda tokens: None,
) -> ShardContent:
    """As :func:`features`, with states that a serving engine computed.

    Args:
        source: where they come from.
        samples: in tokens.
        identity: of the cache.
        advance: takes how many more tokens are done.

    Returns:
        Tensors of a shard.

    Raises:
        ValueError: the source has no states of a sample, or some are not finite.
    """
    content = _empty_content(samples, identity)
    for row, states in enumerate(source.read(samples)):
        kept, scales = _as_stored(
            {layer: states[layer][None] for layer in identity.layers}, stored_dtype(identity.dtype)
        )
        advance(_store(_Forward([row], kept, scales, None, []), content))
    return content


def num_embeddings(target: Target | TargetEnds) -> int:
    """How many token ids a target can read.

    Args:
        target: the model, or its ends.

    Returns:
        Rows of its embedding.
    """
    ends = target.ends if isinstance(target, Target) else target
    weight = ends.embedding.weight
    assert isinstance(weight, Tensor)
    return len(weight)


def _empty_content(samples: Sequence[TokenizedSample], identity: CacheIdentity) -> ShardContent:
    """A shard whose states are not there yet."""
    lengths = [len(sample.input_ids) for sample in samples]
    ends = list(itertools.accumulate(lengths, initial=0))
    dtype = stored_dtype(identity.dtype)
    horizon = identity.local_horizon
    hidden = {layer: torch.empty(ends[-1], identity.hidden_size, dtype=dtype) for layer in identity.layers}
    greedy_TG = torch.zeros(ends[-1], horizon, dtype=torch.int32) if horizon else None
    return ShardContent(
        ids=[sample.id for sample in samples],
        offsets=torch.tensor(ends),
        input_ids=torch.tensor([token for sample in samples for token in sample.input_ids], dtype=torch.int32),
        loss_mask=torch.tensor([kept for sample in samples for kept in sample.loss_mask], dtype=torch.bool),
        hidden=hidden,
        greedy_ids=greedy_TG,
        scales={layer: torch.empty(ends[-1]) for layer in identity.layers if dtype == CODES},
    )


def _check_vocabulary(content: ShardContent, target: Target) -> None:
    size = num_embeddings(target)
    outside = ((content.input_ids < 0) | (content.input_ids >= size)).nonzero()
    if outside.numel():
        place = int(outside[0])
        raise ValueError(
            f"the corpus holds token id {int(content.input_ids[place])}, but {target.name} has {size} tokens; "
            "is the text in this target's tokens?"
        )


def length_batches(lengths: Sequence[int], batch_tokens: int) -> list[list[int]]:
    """Group samples of similar length, longest first, so that rows times longest stays within `batch_tokens`.

    Example: lengths `[2, 9, 8, 3]` and 18 tokens give `[[1, 2], [3, 0]]`.

    Args:
        lengths: of the samples, in tokens.
        batch_tokens: most tokens of a group, padding included; a longer sample is a group of its own.

    Returns:
        Numbers of samples.
    """
    order = sorted(range(len(lengths)), key=lambda index: (-lengths[index], index))
    batches: list[list[int]] = []
    for index in order:
        if batches and lengths[batches[-1][0]] * (len(batches[-1]) + 1) <= batch_tokens:
            batches[-1].append(index)
        else:
            batches.append([index])
    return batches


def padded_ids(samples: Sequence[TokenizedSample]) -> Tensor:
    """Pad ids on the right with 0, which causal attention keeps from every real token.

    Args:
        samples: B of them.

    Returns:
        int64 [B, T].
    """
    longest = max(len(sample.input_ids) for sample in samples)
    return torch.tensor([sample.input_ids + [0] * (longest - len(sample.input_ids)) for sample in samples])


def prompt_lengths(loss_masks: Iterable[Sequence[bool] | Tensor], device: torch.device) -> Tensor:
    """Count the tokens before the first labelled one of each sample, which decoding reads at once. Where none is labelled, all count.

    Args:
        loss_masks: of B samples.
        device: of the result.

    Returns:
        int64 [B].
    """
    masks = [torch.as_tensor(mask, dtype=torch.bool) for mask in loss_masks]
    return torch.tensor([int(mask.int().argmax()) if mask.any() else len(mask) for mask in masks], device=device)


def _launch(target: Target, samples: list[TokenizedSample], rows: list[int], identity: CacheIdentity) -> _Forward:
    ids_BT = padded_ids(samples).to(target.device, non_blocking=True)
    read_B = prompt_lengths((sample.loss_mask for sample in samples), ids_BT.device)
    output = target.prefix(ids_BT, layers=identity.layers, read=read_B)
    layers = {layer: output.feature(layer) for layer in identity.layers}
    states, scales = _as_stored(layers, stored_dtype(identity.dtype))
    sources = {states_BTD.device for states_BTD in layers.values()}
    greedy_BTG = None
    if identity.local_horizon:
        greedy_BTG = greedy_continuations(target, ids_BT, identity.local_horizon, read_B).to("cpu", torch.int32)
    return _Forward(rows, states, scales, greedy_BTG, _ends_of_copies(sources))


def _as_stored(layers: Mapping[str, Tensor], dtype: torch.dtype) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """States [B, T, D] and, of eight bits, their scales [B, T], on their way to the host."""
    states: dict[str, Tensor] = {}
    scales: dict[str, Tensor] = {}
    for layer, states_BTD in layers.items():
        if dtype == CODES:
            states_BTD, scales_BT = quantise(states_BTD)
            scales[layer] = _to_host(scales_BT)
        states[layer] = _to_host(states_BTD.to(dtype))
    return states, scales


def _ends_of_copies(sources: set[torch.device]) -> list[torch.cuda.Event]:
    """Events after the copies from these devices: each on its own device's stream, which is seldom the current device's.

    A process that torchrun started runs on `cuda:LOCAL_RANK` while the current device stays cuda:0, and a target that is
    spread by `device_map` has its layers on several.
    """
    devices = (device for device in sources if device.type == "cuda")
    return [torch.cuda.current_stream(device).record_event() for device in devices]


def _to_host(states: Tensor) -> Tensor:
    if states.device.type != "cuda":
        return states.cpu()
    pinned = torch.empty(states.shape, dtype=states.dtype, pin_memory=True)
    return pinned.copy_(states, non_blocking=True)


def _store(forward: _Forward, content: ShardContent) -> int:
    """Moves the real tokens of a forward to their places; gives how many there are."""
    for copied in forward.arrived:
        copied.synchronize()
    stored = 0
    for row, index in enumerate(forward.rows):
        start, stop = int(content.offsets[index]), int(content.offsets[index + 1])
        for layer, states_BTD in forward.states.items():
            kept_TD = states_BTD[row, : stop - start]
            # Codes of eight bits hold no infinity and may hide a NaN: their scales tell.
            telling_TD = forward.scales[layer][row, : stop - start, None] if forward.scales else kept_TD
            if not torch.isfinite(telling_TD.sum(dtype=torch.float32)):
                _refuse_non_finite(telling_TD, kept_TD.dtype, content.ids[index], layer)
            content.hidden[layer][start:stop] = kept_TD
            if forward.scales:
                content.scales[layer][start:stop] = telling_TD[:, 0]
        if forward.greedy_BTG is not None and content.greedy_ids is not None:
            content.greedy_ids[start:stop] = forward.greedy_BTG[row, : stop - start]
        stored += stop - start
    return stored


def _refuse_non_finite(states_TD: Tensor, dtype: torch.dtype, sample_id: str, layer: str) -> None:
    """The sum that led here may overflow on its own; only a state that is not finite is an error."""
    bad = (~torch.isfinite(states_TD)).any(dim=-1).nonzero()
    if bad.numel():
        raise ValueError(
            f"sample {sample_id}: {layer} at position {int(bad[0])} is NaN or infinite as {dtype}; "
            "store it with --dtype bfloat16 or float32, or run the target with --target-dtype float32"
        )
