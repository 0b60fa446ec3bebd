"""How many bytes a step of plain decoding reads, and how many the draft of a cycle reads.

Owns the counts. Does not know how fast the machine is, nor how long anything took. Counts what must come from memory at least: each weight
once a forward, and the keys and values of the text. What a step writes, and what passes between layers, is small beside it and left out.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import zip_longest

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from draftsmith.models.drafters.drafter import Drafter
from draftsmith.models.target.key_values import KeyValues
from draftsmith.models.target.target import Target
from draftsmith.models.tree.limits import DraftLimits
from draftsmith.models.trunk.known_models import text_base

EXPERT_COUNTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
EXPERTS_OF_A_TOKEN = ("num_experts_per_tok", "num_experts_per_token", "moe_topk", "moe_top_k", "top_k_experts", "moe_k")


@dataclass(frozen=True)
class WeightBytes:
    """What the weights of a model cost a forward.

    Attributes:
        whole: bytes of the weights that every forward reads whole.
        row: bytes of one row of each embedding table: a token reads one. A table that is the output head too counts as ``whole``.
        experts: bytes of all experts of a mixture.
        share: of the experts, which a token needs; 1 where the config does not say it.
    """

    whole: int
    row: int = 0
    experts: int = 0
    share: float = 1.0

    def read_by(self, num_tokens: float) -> int:
        """Bytes that a forward over so many tokens reads. Of experts it is the most: tokens that share experts read fewer."""
        return self.whole + round(self.row * num_tokens + self.experts * min(1.0, self.share * num_tokens))

    def is_upper_bound(self, num_tokens: float) -> bool:
        """Whether :meth:`read_by` may count too much: several tokens may share experts, or the config does not say how many one needs."""
        return self.experts > 0 and (num_tokens > 1 or self.share == 1.0)


@dataclass(frozen=True)
class DraftBytes:
    """What the drafting of one cycle reads.

    Attributes:
        once: bytes of weights that a draft reads once.
        steps: bytes of the weights that each draft step reads, step by step.
        cached: bytes of the drafter's own keys and values that each step reads.
        upper_bound: whether experts make this the most that can be read.
    """

    once: int
    steps: tuple[int, ...]
    cached: int = 0
    upper_bound: bool = False

    @property
    def total(self) -> int:
        """Bytes of the whole draft."""
        return self.once + sum(self.steps) + len(self.steps) * self.cached


def target_weights(target: Target) -> WeightBytes:
    """Count a target's weights as they lie in memory, quantised or not, adapters included.

    Args:
        target: of a multimodal model, only the part that reads text counts.
    """
    modules = (text_base(target.model), target.ends.head)
    return count_weights(modules, (target.ends.head_weight,))


def count_weights(modules: Sequence[nn.Module], heads: Iterable[Tensor]) -> WeightBytes:
    """Count the weights below some modules, each tensor once.

    Args:
        modules: what a forward runs.
        heads: output heads; an embedding table that is one of them is read whole.
    """
    read_whole = {id(head) for head in heads}
    tables = {
        id(part.weight)
        for module in modules
        for part in module.modules()
        if isinstance(part, nn.Embedding) and id(part.weight) not in read_whole
    }
    whole = row = experts = 0
    for name, tensor in _tensors(modules).items():
        size = tensor_bytes(tensor)
        if id(tensor) in tables:
            row += size // tensor.shape[0]
        elif "experts" in name.split("."):
            experts += size
        else:
            whole += size
    return WeightBytes(whole, row, experts, experts_share(modules))


def _tensors(modules: Sequence[nn.Module]) -> dict[str, Tensor]:
    """Weights by name, each once. Those of quantised layers come with their scales."""
    tensors: dict[str, Tensor] = {}
    seen: set[int] = set()
    for number, module in enumerate(modules):
        for name, tensor in module.state_dict(keep_vars=True).items():
            # int64 holds tables of ids, of which single entries are read
            if isinstance(tensor, Tensor) and tensor.dtype != torch.int64 and id(tensor) not in seen:
                tensors[f"{number}.{name}"] = tensor
                seen.add(id(tensor))
    return tensors


def tensor_bytes(tensor: Tensor) -> int:
    """Bytes of a tensor; of one that holds others, such as a quantised weight with its scales, bytes of these."""
    if hasattr(tensor, "__tensor_flatten__"):
        names, _ = tensor.__tensor_flatten__()
        return sum(tensor_bytes(getattr(tensor, name)) for name in names)
    return tensor.numel() * tensor.element_size()


def experts_share(modules: Sequence[nn.Module]) -> float:
    """The share of the experts that one token needs; 1 where no config below these modules says it."""
    for part in (part for module in modules for part in module.modules() if isinstance(part, PreTrainedModel)):
        config = part.config.get_text_config()
        count, chosen = _first(config, EXPERT_COUNTS), _first(config, EXPERTS_OF_A_TOKEN)
        if count and chosen:
            return chosen / count
    return 1.0


def _first(config: PreTrainedConfig, names: Sequence[str]) -> int | None:
    values = (getattr(config, name, None) for name in names)
    return next((value for value in values if isinstance(value, int)), None)


def cached_bytes(layers: Iterable[KeyValues], context: float, num_rows: float = 1.0) -> int:
    """Count the keys and values that a step reads, in all layers. A layer with a sliding window reads no more than its window.

    Example: 2 layers that keep 128 bytes a token read 2 x 128 x 10 = 2,560 bytes behind 10 tokens.

    Args:
        layers: what each keeps.
        context: tokens of a row's text.
        num_rows: decoded together.
    """
    return round(num_rows * sum(layer.read_behind(context) for layer in layers))


def draft_bytes(drafter: Drafter, limits: DraftLimits, context: float = 0.0, num_rows: float = 1.0) -> DraftBytes:
    """Count what the drafting of one cycle reads. The output head counts at every step, whoever it belongs to.

    Where each step has a head of its own, the other weights count as divided among the steps alike. A drafter made of others reads what
    these read. What it looks up does not count: an n-gram table, and its search of the text and of a shared pool.

    Args:
        drafter: attached to its target.
        limits: how it drafts: ``draft_length`` says how many steps.
        context: tokens of a row's text.
        num_rows: decoded together.
    """
    if drafter.parts is not None:
        of_parts = drafter.limits_of_parts(limits)
        return _together([draft_bytes(part, of_parts, context, num_rows) for part in drafter.parts])
    heads = [drafter.step_weight(step) for step in range(drafter.max_draft_steps or 1)]
    weights = count_weights((drafter,), heads)
    own = {id(tensor) for tensor in _tensors((drafter,)).values()}
    once = sum(map(tensor_bytes, drafter.weights_read_once()))
    num_tokens = num_rows * _nodes_of_a_step(limits)
    body = weights.read_by(num_tokens) - once - sum(tensor_bytes(head) for head in heads if id(head) in own)
    if drafter.has_one_head:
        steps = [body + tensor_bytes(heads[0])] * drafter.passes(limits.draft_length)
    else:
        steps = [body // len(heads) + tensor_bytes(head) for head in heads[: limits.draft_length]]
    cached = cached_bytes(drafter.key_values(), context, num_rows)
    return DraftBytes(once, tuple(steps), cached, weights.is_upper_bound(num_tokens))


def _together(parts: Sequence[DraftBytes]) -> DraftBytes:
    """What several drafters read that draft one beside the other, as many steps as the longest of them."""
    steps = zip_longest(*(tuple(step + part.cached for step in part.steps) for part in parts), fillvalue=0)
    return DraftBytes(
        sum(part.once for part in parts), tuple(map(sum, steps)), 0, any(part.upper_bound for part in parts)
    )


def _nodes_of_a_step(limits: DraftLimits) -> int:
    """The most nodes that one draft step reads."""
    return limits.beam_width if limits.paths is None and limits.sampled is None else max(1, limits.max_fed)
