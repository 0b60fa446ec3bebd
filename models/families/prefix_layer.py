"""A Llama layer over all of the target's states, whose output at the last one is what draft heads read (Hydra++, arXiv:2402.05109).

Owns its weights, its run over packed samples in training, and its keys and values in decoding. Knows no heads, trees or losses.

Shape legend: B batch rows, E fresh pairs, T packed tokens, A anchors, D hidden, Dh head size.
"""

from __future__ import annotations

from collections.abc import Callable, Generator

from torch import Tensor, nn
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from draftsmith.models.drafters.draft_records import CacheState, Cycle, Emitted, Opening
from draftsmith.models.drafters.draft_slots import DraftSlots, read_prompt
from draftsmith.models.drafters.rollout import PackedBatch
from draftsmith.models.families.eagle_layer import DraftLayer, Rotation, rms_norm
from draftsmith.models.slots.attention import attend
from draftsmith.models.slots.rollout_attention import Pair, RolloutAttention
from draftsmith.models.slots.slot_cache import SlotCache

Reader = Callable[[Emitted], Tensor]
"""The normed states [B, E, D] of some pairs."""


class PrefixLayer(nn.Module):
    """One Llama decoder layer; it begins as the identity, since what it adds to its residual begins at zero.

    Args:
        config: sizes, norm epsilon and rotary settings of the layer.
    """

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.input_layernorm = LlamaRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.layer = DraftLayer(config, wide=False)
        self.rotation = Rotation(config)

    def reset(self) -> None:
        """Let the layer begin as the identity."""
        nn.init.zeros_(self.layer.self_attn.o_proj.weight)
        nn.init.zeros_(self.layer.mlp.down_proj.weight)

    def over_text(self, states_TD: Tensor, batch: PackedBatch, anchors_A: Tensor) -> Tensor:
        """Run the layer in training.

        Args:
            states_TD: the target's normed states.
            batch: the packed samples that they belong to.
            anchors_A: int64, the positions whose outputs are wanted.

        Returns:
            [A, D].
        """
        inputs_TD = rms_norm(self.input_layernorm, states_TD)
        rotation = self.rotation(batch.positions, states_TD)
        text = self.layer.keys_values(inputs_TD, rotation)
        attention = RolloutAttention(batch.document_ids, batch.positions, anchors_A, *text)
        queries = self.layer.queries(inputs_TD[anchors_A], (rotation[0][anchors_A], rotation[1][anchors_A]))
        return self.layer.finish(states_TD[anchors_A], attention(queries, []))

    def start_in_steps(self, opening: Opening, read: Reader) -> Generator[None, None, CacheState]:
        """Read the states of the prompts, in chunks; the last one stays pending.

        Args:
            opening: the prompts.
            read: gives the states of pairs.

        Returns:
            The state of the drafter.
        """
        cache = SlotCache(opening.room + max(opening.limits.max_fed, opening.limits.draft_length + 1), num_layers=1)

        def write(pairs: Emitted, positions_BE: Tensor) -> None:
            states_BED = read(pairs)
            self._write(cache, rms_norm(self.input_layernorm, states_BED), self.rotation(positions_BE, states_BED))

        return (yield from read_prompt(opening, cache, write))

    def at_last(self, state: CacheState, cycle: Cycle, read: Reader) -> Tensor:
        """Write keys and values of all pending pairs, and run the layer at the last one of each row.

        Args:
            state: of the drafter.
            cycle: what the decoder knows of the rows.
            read: gives the states of pairs.

        Returns:
            [B, D].
        """
        slots = DraftSlots(state.cache, cycle, state.pending.tokens_BE.shape[1])
        states_BED = read(state.pending.slots(0, slots.num_fresh))
        inputs_BED = rms_norm(self.input_layernorm, states_BED)
        positions_BE = slots.aim_fresh(state.pending.counts_B)
        seen = self._write(slots.cache, inputs_BED, self.rotation(positions_BE, states_BED))
        last_B1 = state.pending.counts_B[:, None] - 1
        last_B1D = last_B1[..., None].expand(-1, -1, states_BED.shape[-1])
        position_B1 = positions_BE.gather(1, last_B1)
        queries = self.layer.queries(inputs_BED.gather(1, last_B1D), self.rotation(position_B1, states_BED))
        attended = attend(queries.transpose(1, 2), *seen, slots.text_mask(position_B1))
        return self.layer.finish(states_BED.gather(1, last_B1D), attended.transpose(1, 2))[:, 0]

    def _write(self, cache: SlotCache, inputs_BED: Tensor, rotation: Pair) -> tuple[Tensor, Tensor]:
        """Write keys and values where the cache is aimed at; those of its visible slots, [B, G, S, Dh] each."""
        keys, values = self.layer.keys_values(inputs_BED, rotation)
        return cache.update(keys.transpose(1, 2), values.transpose(1, 2), 0)
