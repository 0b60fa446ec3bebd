"""Rows that ride through a target beside its tokens: what they see, what they give, and that they leave nothing behind."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from doubles import family_configs, random_model, random_target
from heads import deep_target
from recurrent_models import recurrent_model
from torch import Tensor
from torch.nn import functional as F
from transformers.cache_utils import DynamicCache

from draftsmith.models import Target, tree_from_paths
from draftsmith.models.slots.slot_cache import SlotCache
from draftsmith.models.target.target import TargetOutput
from draftsmith.models.trunk.forwards import joined, read_chunks, read_tree
from draftsmith.models.trunk.riders import RIDERS, Carried, Riders
from draftsmith.models.trunk.text_riders import ride_behind, rider_fault

TEXT = [1, 5, 9, 30, 7, 7, 12, 3, 22, 41, 6, 2]
FAMILIES = ["llama", "qwen3", "mistral", "gemma3", "phi3"]


def noise(seed: int, scale: float = 1.0) -> Riders:
    """Three riders of random vectors, two of which enter at inner blocks and read their carrier's state."""

    def vectors(rider: int, states: Tensor) -> Tensor:
        drawn = torch.randn(states.shape[-1], generator=torch.Generator().manual_seed(seed + rider))
        return scale * drawn + (states if rider else torch.zeros_like(states))

    return Riders((0, 1, 2), vectors)


def prompt_read(target: Target, text: list[int], room: int = 40) -> SlotCache:
    """A cache with the text in it."""
    cache = target.new_cache(room, 1)
    assert isinstance(cache, SlotCache)
    list(read_chunks(target, cache, torch.tensor([text]), torch.tensor([len(text)])))
    return cache


def read(target: Target, cache: SlotCache, length: int, paths: list[list[int]], riders: Riders | None) -> TargetOutput:
    """A forward over a tree behind ``length`` cached tokens; every path begins with the same root."""
    tree = tree_from_paths(torch.tensor([paths[0][0]]), torch.tensor([[path[1:] for path in paths]]))
    return read_tree(target, cache, tree, tree.ancestors(), torch.tensor([length]), [length], riders=riders)


def test_positions_and_mask_of_two_riders_behind_a_carrier() -> None:
    carried = Carried(Riders((0, 0), lambda rider, states: states), torch.tensor([[0, 1]]), 2)
    assert carried.positions(torch.tensor([[7, 8]])).tolist() == [[7, 8, 8, 9, 9, 10]]
    tokens = torch.tensor([[1, 1, 0, 0, 0, 0, 0], [1, 1, 1, 0, 0, 0, 0]]).bool()[None, None]
    # One cached token; rows: the tokens, their first riders, their second riders, at slots 1 to 6.
    assert carried.mask(tokens, torch.tensor([3]))[0, 0].int().tolist() == [
        [1, 1, 0, 0, 0, 0, 0],
        [1, 1, 1, 0, 0, 0, 0],
        [1, 1, 0, 1, 0, 0, 0],
        [1, 1, 1, 0, 1, 0, 0],
        [1, 1, 0, 1, 0, 1, 0],
        [1, 1, 1, 0, 1, 0, 1],
    ]


@pytest.mark.parametrize("family", FAMILIES)
def test_a_rider_with_the_state_of_a_token_comes_out_as_this_token(family: str) -> None:
    target = random_target(family)
    trunk = target.ends.trunk
    assert trunk is not None
    names = {entry: trunk.tap_before(entry) for entry in (0, 1)}
    plain = target.prefix(torch.tensor([TEXT]), tuple(names.values()))
    length = 8
    tokens = {rider: plain.layers[names[entry]][:, length + 2 + rider][:, None] for rider, entry in enumerate((0, 1))}
    riders = Riders((0, 1), lambda rider, states: tokens[rider].expand_as(states))
    # The second branch is the text, so its last node carries what follows it.
    output = read(target, prompt_read(target, TEXT[:length]), length, [[TEXT[8], 50], [TEXT[8], TEXT[9]]], riders)
    rode = output.layers[RIDERS][0, -1].unflatten(0, (2, -1))
    torch.testing.assert_close(rode, plain.normed[0, length + 2 : length + 4], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_no_token_sees_a_rider_and_no_later_forward_does(family: str) -> None:
    target, length, paths = random_target(family), 8, [[22, 41, 6], [22, 3, 2]]
    quiet, loud = prompt_read(target, TEXT[:length]), prompt_read(target, TEXT[:length])
    first, other = (
        read(target, cache, length, paths, riders) for cache, riders in ((quiet, noise(0)), (loud, noise(9, 50.0)))
    )
    assert torch.equal(first.normed, other.normed), "what rides changes no bit of what the tokens give"
    assert not torch.allclose(first.layers[RIDERS], other.layers[RIDERS])
    nodes = first.normed.shape[1]
    for index in range(len(quiet)):
        for own, same in zip(quiet.layer(index), loud.layer(index), strict=True):
            assert torch.equal(own[:, :, : length + nodes], same[:, :, : length + nodes])
    fresh = prompt_read(target, TEXT[:length])
    never = read(target, fresh, length, paths, None)
    torch.testing.assert_close(first.normed, never.normed, rtol=1e-4, atol=1e-4)
    # The root is accepted: what the riders left behind it is written over or hidden.
    for cache in (quiet, loud):
        read(target, cache, length, paths, None)
    after = [read(target, cache, length + 1, [[41, 6]], None).normed for cache in (quiet, loud, fresh)]
    assert all(torch.equal(own, after[2]) for own in after), "a cache is as if nothing had ridden"


def test_riders_behind_packed_texts_are_those_of_decoding() -> None:
    target, riders = deep_target(), noise(3)
    trunk = target.ends.trunk
    assert trunk is not None
    ids, documents = torch.tensor([*TEXT[:7], *TEXT]), torch.tensor([0] * 7 + [1] * len(TEXT))
    positions = torch.tensor([*range(7), *range(len(TEXT))])
    packed = ride_behind(trunk, riders, ids, positions, documents, torch.tensor([5, 7 + 8]))
    decoded = read(target, prompt_read(target, TEXT[:8]), 8, [[TEXT[8], 50], [TEXT[8], TEXT[9]]], riders)
    torch.testing.assert_close(packed[:, 1], decoded.layers[RIDERS][0, 0].unflatten(0, (3, -1)), rtol=1e-4, atol=1e-4)
    other = read(target, prompt_read(target, TEXT[:5]), 5, [[TEXT[5], 50]], riders)
    torch.testing.assert_close(packed[:, 0], other.layers[RIDERS][0, 0].unflatten(0, (3, -1)), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("chunk", [3, 4, 64])
def test_riders_behind_prompts_of_any_chunks_are_those_of_whole_ones(chunk: int) -> None:
    target, riders = deep_target(), noise(3)
    trunk = target.ends.trunk
    assert trunk is not None
    texts = [TEXT, TEXT[2:9]]
    padded = torch.tensor([texts[0], texts[1] + [0] * 5])
    lengths = torch.tensor([12, 7])
    cache = target.new_cache(20, 2)
    read_in_chunks = joined(list(read_chunks(target, cache, padded, lengths, (), chunk, riders=riders)))[RIDERS]
    for row, text in enumerate(texts):
        ids = torch.tensor(text)
        alone = ride_behind(
            trunk, riders, ids, torch.arange(len(ids)), torch.zeros_like(ids), torch.tensor([len(ids) - 1])
        )
        own = read_in_chunks[row, (len(text) - 1) // chunk].unflatten(0, (3, -1))
        torch.testing.assert_close(own, alone[:, 0], rtol=1e-4, atol=1e-4)


class Padded(DynamicCache):
    """Keys and values that autograd follows, with zeros in the place of rows that a block does not have."""

    def update(self, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        keys, values = super().update(*args, **kwargs)
        absent = (0, 0, 0, len(TEXT) + 6 - keys.shape[2])
        return F.pad(keys, absent), F.pad(values, absent)


def test_gradients_reach_what_rides_as_through_one_forward_of_everything() -> None:
    target = deep_target()
    trunk = target.ends.trunk
    assert trunk is not None
    ids, count = torch.tensor(TEXT), len(TEXT)
    prompt = torch.randn(2, 32, generator=torch.Generator().manual_seed(0), requires_grad=True)
    weights = torch.randn(2, 3, 32, generator=torch.Generator().manual_seed(1))
    anchors = torch.tensor([2, 6, 9])
    riders = Riders((0, 3), lambda rider, states: states * (rider == 1) + prompt[rider])
    states = ride_behind(trunk, riders, ids, torch.arange(count), torch.zeros_like(ids), anchors)
    (states * weights).sum().backward()
    apart, prompt.grad = prompt.grad, None
    carried = Carried(riders, anchors[None], count)
    causal = torch.ones(count, count + 6, dtype=torch.bool).tril()[None, None]
    together = trunk.run(
        ids[None],
        cache=Padded(),
        positions=carried.positions(torch.arange(count)[None]),
        mask=carried.mask(causal, torch.tensor([count])),
        riders=carried,
    )
    rode = together.layers[RIDERS][0].unflatten(1, (2, -1)).transpose(0, 1)
    torch.testing.assert_close(states, rode, rtol=1e-4, atol=1e-4)
    (rode * weights).sum().backward()
    assert apart is not None
    assert prompt.grad is not None
    torch.testing.assert_close(apart, prompt.grad, rtol=1e-3, atol=1e-3)
    assert all(weight.grad is None for weight in target.model.parameters()), "the target stays frozen"


def test_a_target_that_is_not_whole_on_one_device_takes_no_riders() -> None:
    def fault(change: Callable[[Target], object]) -> str:
        target = random_target("llama")
        assert target.ends.trunk is not None
        change(target)
        return rider_fault(target.ends.trunk, Riders((0, 1), lambda rider, states: states))

    def blocks(target: Target) -> list[torch.nn.Module]:
        assert target.ends.trunk is not None
        return target.ends.trunk.blocks

    assert fault(lambda target: None) == ""
    spread = fault(lambda target: blocks(target)[1].to("meta"))
    assert spread == "its blocks lie on cpu and meta, and riders enter a target on one device: leave device_map out"

    def offload(target: Target) -> None:
        for block in blocks(target):
            block.to("meta")._hf_hook = object()  # as accelerate leaves it

    assert "its blocks are fetched one by one (offloaded)" in fault(offload)

    def divide(target: Target) -> None:
        next(blocks(target)[0].parameters()).ds_tensor = torch.zeros(1)  # type: ignore[attr-defined]

    divided = fault(divide)
    assert divided.startswith("its weights are divided among processes")
    assert divided.endswith("leave target_sharding out")


def test_targets_that_take_no_riders_say_why() -> None:
    def fault(target: Target, entries: tuple[int, ...]) -> str:
        assert target.ends.trunk is not None
        return rider_fault(target.ends.trunk, Riders(entries, lambda rider, states: states))

    llama = random_target("llama")
    assert fault(llama, (0, 1, 2)) == ""
    assert fault(llama, (2, 1)) == "entries [2, 1] fall; a rider must enter no earlier than those before it"
    assert fault(llama, (1, 3)) == "entries [1, 3] are not all blocks of the target; they must be within 0 to 2"
    assert "its blocks take no further rows (" in fault(random_target("gpt2"), (1,))
    config = family_configs()["llama"]
    config.rope_parameters = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0}
    dynamic = Target.from_model(random_model(config))
    assert fault(dynamic, (0,)) == "its rotary factors follow the length of the text"
    recurrent = Target.from_model(recurrent_model("Lfm2"))
    assert fault(recurrent, (0,)) == "it keeps a recurrent state, which takes no rows beside the text"
