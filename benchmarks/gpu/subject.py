"""What the GPU benchmark measures: a random target of the shape of Llama-3.1-8B, random drafters, prompts, and the ways to run cycles.

No download: the weights are random numbers, which cost as much to read as trained ones.
"""

from __future__ import annotations

import itertools
import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from draftsmith.decode import Engine, Generation, GenerationSettings
from draftsmith.decode.runners import CompiledRunner
from draftsmith.models.drafters.drafter import Drafter
from draftsmith.models.families.eagle import Eagle
from draftsmith.models.families.redrafter import ReDrafter
from draftsmith.models.target.target import Target
from draftsmith.models.tree.limits import DraftLimits
from draftsmith.models.tree.shapes import parse_shape

FAMILIES: dict[str, tuple[type[ReDrafter] | type[Eagle], str]] = {
    "ReDrafter": (ReDrafter, "4x5n15"),
    "EAGLE": (Eagle, "10x6n60"),
}
STEADY_FROM = 4
"""Cycles before this one of a run may compile, capture or warm up."""


@dataclass(frozen=True)
class Scale:
    """How large everything is.

    Attributes:
        name: `full` or `tiny`.
        sizes: of the target.
        contexts: prompt lengths at which steps are timed.
        new_tokens: of a timed reply.
        draft_every: every so many tokens are in the draft vocabulary.
        float32_layers: of the target on which float32 is compared.
        runner_layers: of the target on which runners are compared; compiling all layers would take minutes.
        rows: batch sizes.
        train_tokens: of a training step.
    """

    name: str
    sizes: dict[str, int]
    contexts: tuple[int, ...]
    new_tokens: int
    draft_every: int
    float32_layers: int
    runner_layers: int
    rows: tuple[int, ...]
    train_tokens: int


def llama(hidden: int, inner: int, layers: int, heads: int, groups: int, vocabulary: int) -> dict[str, int]:
    """Sizes as `LlamaConfig` names them."""
    return {
        "hidden_size": hidden,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": groups,
        "vocab_size": vocabulary,
    }


SCALES = {
    "full": Scale("full", llama(4096, 14336, 32, 32, 8, 128256), (256, 2048), 64, 4, 8, 4, (1, 4, 16), 4096),
    "tiny": Scale("tiny", llama(32, 64, 2, 4, 2, 96), (8, 16), 12, 4, 2, 2, (1, 2), 64),
}


def random_target(scale: Scale, dtype: torch.dtype, device: torch.device, layers: int | None = None) -> Target:
    """A Llama of random weights, made on the device. Its head is sharp enough that rounding alone does not decide the argmax.

    Args:
        scale: says its sizes.
        dtype: of its weights.
        device: where it lies.
        layers: fewer than the scale says.
    """
    sizes = dict(scale.sizes)
    sizes["num_hidden_layers"] = min(layers or sizes["num_hidden_layers"], sizes["num_hidden_layers"])
    config = LlamaConfig(**sizes, max_position_embeddings=8192, tie_word_embeddings=False)
    default = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            torch.manual_seed(0)
            model = LlamaForCausalLM(config)
    finally:
        torch.set_default_dtype(default)
    with torch.no_grad():
        model.lm_head.weight.normal_(0.0, 4.0 / math.sqrt(sizes["hidden_size"]))
    return Target(model, f"random Llama ({scale.name})", "random")


def random_drafter(family: str, target: Target, scale: Scale) -> Drafter:
    """A drafter of random weights with a draft vocabulary, on the target's device in its dtype."""
    kind, _ = FAMILIES[family]
    ids = torch.arange(0, scale.sizes["vocab_size"], scale.draft_every)
    with torch.device("cpu"):
        drafter = kind.for_target(target.ends, draft_token_ids=ids)
    torch.nn.Module.to(drafter, device=target.device, dtype=target.dtype)
    return drafter.eval().requires_grad_(False)


def shape_of(family: str) -> DraftLimits:
    """How a family drafts here."""
    return parse_shape(FAMILIES[family][1])


def prompt(scale: Scale, length: int, seed: int = 0) -> list[int]:
    """Random token ids."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(1, scale.sizes["vocab_size"], (length,), generator=generator).tolist()


def runners(device: torch.device) -> dict[str, dict[str, Any]]:
    """The ways to run cycles on a device, as arguments of `Engine`. On a CPU the compiled one traces cycles without generating code."""
    if device.type == "cuda":
        return {"eager": {"compile": "off"}, "compiled": {"runner": CompiledRunner}, "captured": {"compile": "on"}}
    return {"eager": {"compile": "off"}, "compiled": {"runner": partial(CompiledRunner, backend="eager")}}


def fastest_runner(device: torch.device) -> dict[str, Any]:
    """The way that the goals are about: captured on CUDA, eager elsewhere."""
    ways = runners(device)
    return ways.get("captured", ways["eager"])


@dataclass
class Timing:
    """When the cycles of one run ended.

    Attributes:
        started: seconds, when the run began.
        ends: seconds of the first row's prefill and of each of its cycles.
        generations: what was emitted.
    """

    started: float
    ends: list[float] = field(default_factory=list)
    generations: list[Generation] = field(default_factory=list)

    @property
    def prefill_seconds(self) -> float:
        """Until the first token."""
        return self.ends[0] - self.started

    @property
    def first_use_seconds(self) -> float:
        """From the first token until cycles are steady: what compiling and capturing take."""
        return self.ends[min(STEADY_FROM, len(self.ends)) - 1] - self.ends[0]

    @property
    def cycle_seconds(self) -> float:
        """Median of the steady cycles."""
        steady = self.ends[STEADY_FROM - 1 :]
        pairs = itertools.pairwise(steady)
        return statistics.median(after - before for before, after in pairs)

    @property
    def token_ids(self) -> list[list[int]]:
        """The replies."""
        return [generation.token_ids for generation in self.generations]


def timed(engine: Engine, prompts: Sequence[Sequence[int]], new_tokens: int) -> Timing:
    """One run: the host reads the tokens of each cycle, so the time it learns of them is when the device has made them."""
    timing = Timing(time.perf_counter())

    def note(index: int, tokens: list[int]) -> None:
        if index == 0:
            timing.ends.append(time.perf_counter())

    settings = GenerationSettings(max_new_tokens=new_tokens)
    timing.generations = engine.generate([list(ids) for ids in prompts], settings, on_tokens=note)
    return timing


def median_seconds(work: Callable[[], object], device: torch.device, repeats: int = 5, warm: int = 2) -> float:
    """Median seconds of a call, the device awaited."""
    seconds = []
    for number in range(warm + repeats):
        started = now(device)
        work()
        if number >= warm:
            seconds.append(now(device) - started)
    return statistics.median(seconds)


def now(device: torch.device) -> float:
    """Seconds, once the device has done all that was asked of it."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
