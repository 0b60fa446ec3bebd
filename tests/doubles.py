"""Small targets and drafters for the decoder's tests: random models of many families, and drafters that mean harm.

Shape legend: B batch rows, M paths, L drafted depth.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import torch
import transformers
from torch import Tensor
from torch.nn import functional as F

from draftsmith.models import (
    Cycle,
    Drafter,
    DrafterConfig,
    DraftLimits,
    DraftTree,
    Emitted,
    KeptRows,
    Opening,
    PackedBatch,
    Rollout,
    Target,
    tree_from_paths,
)
from draftsmith.models.drafters.draft_records import DraftState
from draftsmith.models.tree.search import Expander
from draftsmith.models.trunk.riders import RIDERS, Riders
from draftsmith.models.trunk.text_riders import ride_behind

VOCAB = 61
BOS = 1
_COMMON = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 96,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_ENDS = {"bos_token_id": 1, "eos_token_id": 2}


def family_configs() -> dict[str, transformers.PreTrainedConfig]:
    """A tiny config of each supported family; windows are short enough to matter."""
    t = transformers
    return {
        "llama": t.LlamaConfig(**_COMMON),
        "qwen2": t.Qwen2Config(**_COMMON),
        "qwen3": t.Qwen3Config(**_COMMON, head_dim=8),
        "mistral": t.MistralConfig(**_COMMON, sliding_window=7),
        "gemma2": t.Gemma2Config(**_COMMON, head_dim=8, sliding_window=7, query_pre_attn_scalar=8),
        "gemma3": t.Gemma3TextConfig(**_COMMON, head_dim=8, sliding_window=7, sliding_window_pattern=2, query_pre_attn_scalar=8),
        "phi3": t.Phi3Config(**_COMMON),
        "gpt2": t.GPT2Config(vocab_size=VOCAB, n_embd=32, n_layer=3, n_head=4, n_positions=96, **_ENDS),
        "gpt_neox": t.GPTNeoXConfig(
            vocab_size=VOCAB, hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4,
            max_position_embeddings=96, **_ENDS,
        ),
    }  # fmt: skip


def random_model(config: transformers.PreTrainedConfig, seed: int = 0) -> transformers.PreTrainedModel:
    """A model with weights large enough that its choices vary from token to token."""
    torch.manual_seed(seed)
    soft_capped = getattr(config, "attn_logit_softcapping", None)
    model = transformers.AutoModelForCausalLM.from_config(
        config, attn_implementation="eager" if soft_capped else "sdpa"
    )
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim > 1:
                parameter.normal_(0.0, 0.25)
            elif "bias" in name:
                parameter.normal_(0.0, 0.1)
    return model.eval()


def random_target(family: str = "llama", seed: int = 0) -> Target:
    """A tiny random target of a family."""
    return Target.from_model(random_model(family_configs()[family], seed), name=f"tiny-{family}")


@dataclass(frozen=True)
class HistoryState:
    """The text of each row so far: what an oracle needs."""

    texts: list[list[int]]

    def select_rows(self, kept: KeptRows) -> HistoryState:
        """Some rows only."""
        return HistoryState([self.texts[row] for row in kept.order])


Manner = Literal["oracle", "random", "wrong", "same", "half", "late"]


class PlannedDrafter(Drafter):
    """Proposes paths by plan: the target's own greedy continuation (oracle), noise, always wrong tokens, all the same beam,
    oracle paths that go wrong half way, or oracle paths hidden in the last of several random beams."""

    config_class = DrafterConfig

    def __init__(self, target: Target, manner: Manner, width: int = 3, depth: int = 4, seed: int = 0) -> None:
        super().__init__(DrafterConfig(hidden_size=target.ends.hidden_size, vocab_size=target.ends.vocab_size))
        self.plan = (target, manner, width, depth)
        self.generator = torch.Generator().manual_seed(seed)
        self.post_init()

    @property
    def head_weight(self) -> Tensor:
        raise ValueError("a planned drafter has no head")

    def teacher_forced(self, batch: PackedBatch, rollout: Rollout) -> Tensor:
        raise ValueError("a planned drafter is not trained")

    def start(self, opening: Opening) -> HistoryState:
        return _extended([[first] for first in opening.first_B.tolist()], opening.prompt)

    def expander(self, state: DraftState, cycle: Cycle, limits: DraftLimits) -> Expander:
        raise ValueError("a planned drafter proposes whole paths")

    def advance(self, state: HistoryState, emitted: Emitted) -> HistoryState:  # type: ignore[override]
        return _extended(state.texts, emitted)

    def follow(self, state: HistoryState, cycle: Cycle, limits: DraftLimits) -> HistoryState:  # type: ignore[override]
        return state

    def propose(self, state: HistoryState, cycle: Cycle, limits: DraftLimits) -> DraftTree:  # type: ignore[override]
        target, manner, width, depth = self.plan
        noise_BML = torch.randint(0, VOCAB, (len(state.texts), width, depth), generator=self.generator)
        root_B = torch.tensor([text[-1] for text in state.texts])
        if manner == "random":
            return tree_from_paths(root_B, noise_BML)
        best_BL = torch.tensor([greedy_by_hand(target, text, depth) for text in state.texts])
        if manner == "oracle":
            noise_BML[:, 0] = best_BL
        elif manner == "late":
            noise_BML[:, -1] = best_BL
        elif manner == "half":
            noise_BML[:, 0, : depth // 2] = best_BL[:, : depth // 2]
            noise_BML[:, 1] = (best_BL + 1) % VOCAB
        elif manner == "same":
            noise_BML[:] = best_BL[:, None]
        else:
            noise_BML[:] = (best_BL[:, None] + 1 + torch.arange(width)[:, None] % 3) % VOCAB
        return tree_from_paths(root_B, noise_BML)


def _extended(texts: list[list[int]], emitted: Emitted) -> HistoryState:
    rows = zip(texts, emitted.tokens_BE.tolist(), emitted.counts_B.tolist(), strict=True)
    return HistoryState([text + tokens[:count] for text, tokens, count in rows])


@torch.inference_mode()
def greedy_by_hand(target: Target, text: list[int], num_tokens: int) -> list[int]:
    """Greedy continuation by the model's own forward over the whole text, without any of our code."""
    text = list(text)
    for _ in range(num_tokens):
        text.append(int(target.model(input_ids=torch.tensor([text[-95:]]), use_cache=False).logits[0, -1].argmax()))
    return text[-num_tokens:]


def opening(
    target: Target,
    texts: list[list[int]],
    limits: DraftLimits,
    layers: tuple[str, ...],
    riders: Riders | None = None,
) -> Opening:
    """What a drafter receives after the target has read texts of one length; the last token of each is its root."""
    ids_BT = torch.tensor(texts)
    states = target.prefix(ids_BT[:, :-1], layers=layers)
    counts_B = torch.full((len(texts),), ids_BT.shape[1] - 1)
    features = {name: states.feature(name).clone() for name in layers}
    if riders is not None:
        features[RIDERS] = torch.stack(
            [ridden(target, riders.first(limits.draft_length), ids_T[:-1]) for ids_T in ids_BT]
        )
    pairs = Emitted(ids_BT[:, 1:], features, counts_B)
    return Opening(pairs, ids_BT[:, 0], limits, room=90)


def ridden(target: Target, riders: Riders, ids_T: Tensor) -> Tensor:
    """[T, K D]: what rides behind every token of a text."""
    place_T = torch.arange(len(ids_T))
    assert target.ends.trunk is not None
    states_KTD = ride_behind(target.ends.trunk, riders, ids_T, place_T, torch.zeros_like(ids_T), place_T)
    return states_KTD.transpose(0, 1).flatten(1)


def first_cycle(start: Opening) -> Cycle:
    """What the decoder knows of the rows right after a prompt."""
    lengths = start.prompt.counts_B.tolist()
    return Cycle(start.prompt.counts_B, lengths, lengths)


@torch.inference_mode()
def draft(target: Target, drafter: Drafter, texts: list[list[int]], limits: DraftLimits) -> DraftTree:
    """One draft behind texts of one length."""
    drafter = drafter.bound(target.ends)
    start = opening(target, texts, limits, drafter.features, drafter.riders)
    return drafter.propose(drafter.start(start), first_cycle(start), limits)


@torch.inference_mode()
def served_logits(target: Target, drafter: Drafter, text: list[int], num_steps: int) -> Tensor:
    """Draft logits [K, Vd] that serving gives along a text: its last ``num_steps`` tokens are the root and what is drafted below it."""
    root = len(text) - num_steps
    limits = DraftLimits(1, num_steps)
    start = opening(target, [text[: root + 1]], limits, drafter.features, drafter.riders)
    expander = drafter.expander(drafter.start(start), first_cycle(start), limits)
    logits = [expander.begin()[0, 0]]
    for token in text[root + 1 :]:
        logits.append(expander.extend(torch.tensor([[token]]), torch.tensor([[0]]))[0, 0])
    return torch.stack(logits)


@torch.no_grad()
def ragged_drafts(
    target: Target, drafter: Drafter, texts: list[list[int]], roots: list[list[int]], limits: DraftLimits, fixed: bool
) -> Iterator[Expander]:
    """One draft after another of rows of different lengths; ``roots[i]`` are the places of the rows' roots at draft i.

    Where shapes are fixed, all rows tell the decoder the same upper bounds, as in a compiled cycle.
    """
    room, most = len(texts[0]) + limits.draft_length, limits.draft_length + 1
    state, before = None, [0] * len(texts)
    for places in roots:
        width = most if fixed and state is not None else 1
        pairs = _pairs_between(target, texts, before, places, drafter.features, width)
        if state is None:
            first_B = torch.tensor([text[0] for text in texts])
            state = drafter.start(Opening(pairs, first_B, limits, room=room, fixed_shapes=fixed))
        else:
            state = drafter.advance(state, pairs)
        fresh = [end - begin for begin, end in zip(before, places, strict=True)]
        known = ([room] * len(texts), [most] * len(texts)) if fixed else (places, fresh)
        yield drafter.expander(state, Cycle(torch.tensor(places), *known, fixed_shapes=fixed), limits)
        before = places


def _pairs_between(
    target: Target, texts: list[list[int]], begins: list[int], ends: list[int], layers: tuple[str, ...], width: int
) -> Emitted:
    """What came after a token of each text, up to another one. Noise follows in shorter rows, which no draft may see."""
    counts = [end - begin for begin, end in zip(begins, ends, strict=True)]
    width = max(width, *counts)
    tokens, features = [], {name: [] for name in layers}  # type: ignore[var-annotated]
    for text, begin, end in zip(texts, begins, ends, strict=True):
        output, more = target.prefix(torch.tensor([text[:-1]]), layers=layers), width - (end - begin)
        tokens.append(F.pad(torch.tensor(text[begin + 1 : end + 1]), (0, more), value=3))
        for name in layers:
            features[name].append(F.pad(output.feature(name)[0, begin:end].clone(), (0, 0, 0, more), value=7.0))
    stacked = {name: torch.stack(rows) for name, rows in features.items()}
    return Emitted(torch.stack(tokens), stacked, torch.tensor(counts))


def tensors_of(part: object) -> list[Tensor]:
    """Every tensor that a batch holds, in the order of its parts."""
    if isinstance(part, Tensor):
        return [part]
    if isinstance(part, dict):
        return [tensor for entry in part.values() for tensor in tensors_of(entry)]
    if hasattr(part, "layer") and hasattr(part, "capacity"):
        return [tensor for index in range(len(part)) for tensor in part.layer(index)]  # type: ignore[arg-type]
    if hasattr(part, "__dataclass_fields__") and "prompt" not in part.__dataclass_fields__:
        return [tensor for name in part.__dataclass_fields__ for tensor in tensors_of(getattr(part, name))]
    return []
