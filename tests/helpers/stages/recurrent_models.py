"""Tiny random models whose layers keep a recurrent state, one of each class, and a drafter whose chains are right up to some token.

Shape legend: B batch rows, L drafted depth.
"""

from __future__ import annotations

from typing import Any

import torch
import transformers
from doubles import VOCAB, HistoryState, PlannedDrafter, greedy_by_hand, random_model

from draftsmith.models import Cycle, DraftLimits, DraftTree, Target, tree_from_paths

_COMMON: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 96,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2}
_DELTA_NET = {
    "head_dim": 16,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
}
_LINEAR = ["linear_attention", "linear_attention", "full_attention"]
_MAMBA_2 = {"mamba_n_heads": 4, "mamba_d_head": 16, "mamba_d_state": 8, "mamba_n_groups": 1, "mamba_chunk_size": 4}
_OF_CLASS: dict[str, dict[str, Any]] = {
    "Qwen3Next": _EXPERTS
    | _DELTA_NET
    | {"layer_types": _LINEAR, "moe_intermediate_size": 16, "shared_expert_intermediate_size": 16},
    "Qwen3_5Text": _DELTA_NET | {"layer_types": _LINEAR},
    "NemotronH": {
        "layers_block_type": ["linear_attention", "moe", "full_attention", "linear_attention", "mlp"],
        "head_dim": 8,
        "mamba_num_heads": 4,
        "mamba_head_dim": 16,
        "n_groups": 2,
        "ssm_state_size": 8,
        "chunk_size": 4,
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 16,
        "moe_shared_expert_intermediate_size": 16,
    },
    "GraniteMoeHybrid": _MAMBA_2
    | {
        "layer_types": _LINEAR,
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "shared_intermediate_size": 16,
        "logits_scaling": 2.0,
    },
    "Lfm2": {"layer_types": ["conv", "conv", "full_attention"], "block_multiple_of": 16},
    "Jamba": _EXPERTS | {"attn_layer_period": 3, "attn_layer_offset": 2, "mamba_d_state": 8, "mamba_dt_rank": 4},
}
CLASSES = tuple(_OF_CLASS)


def recurrent_model(name: str, **changes: Any) -> transformers.PreTrainedModel:
    """A random model of three layers or so.

    Args:
        name: one of ``CLASSES``.
        changes: to its config.

    Returns:
        The model, in evaluation mode.
    """
    own = dict(_OF_CLASS[name])
    if name != "NemotronH":
        own["num_hidden_layers"] = 3
    return random_model(getattr(transformers, f"{name}Config")(**(_COMMON | own | changes)))


class Wavering(PlannedDrafter):
    """Drafts chains that follow the target's own choices for none, some or all of their tokens, by turns."""

    def __init__(self, target: Target, depth: int = 4) -> None:
        super().__init__(target, "wrong", width=1, depth=depth)

    def propose(self, state: HistoryState, cycle: Cycle, limits: DraftLimits) -> DraftTree:
        target, _, _, depth = self.plan
        chains_BL = torch.tensor([greedy_by_hand(target, text, depth) for text in state.texts])
        for row, text in enumerate(state.texts):
            right = len(text) % (depth + 1)
            chains_BL[row, right:] = (chains_BL[row, right:] + 1) % VOCAB
        return tree_from_paths(torch.tensor([text[-1] for text in state.texts]), chains_BL[:, None])
