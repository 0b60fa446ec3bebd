"""Chimera: a head that reads the last three tokens together, and the whole text through the target's states (arXiv:2402.15758).

    g_{t+1} = E(x_{t+1}) + W_2 silu(W_1 [E(x_{t+1}); E(x_t); E(x_{t-1})])      trigram encoder
    o_t     = layer(fc([g; f])_1 .. fc([g; f])_t)                            full-context encoder over the target's states f
    P       = head(o_t + silu(W_r o_t))                                      residual decoding head; the head is the target's own

The rest is EAGLE-1: a draft step is fed what the step before it gave the head. The paper has a decoding head for each step instead, and
says little of sizes; `docs/reference/families/chimera.md` lists what was chosen here.

Owns the drafter, which tokens its encoder reads, its settings and its record. Knows nothing of losses, trees or verification.

Shape legend: B batch rows, E fresh pairs, M nodes of a layer, T packed tokens, A anchors, D hidden, Vd draft vocabulary.
"""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from draftsmith.models.drafters.draft_records import CacheState, Cycle, Emitted, Opening
from draftsmith.models.drafters.family import About, Family
from draftsmith.models.drafters.rollout import PackedBatch, Rollout
from draftsmith.models.families.eagle import Eagle, EagleFamily
from draftsmith.models.families.eagle_base import FeatureDraft
from draftsmith.models.families.eagle_config import EagleConfig
from draftsmith.models.tree.limits import DraftLimits

NO_TOKEN = -1
BEFORE = "tokens.before"
"""In the pairs of a state, [B, E, 2]: the token before each pair's own and the one before that, or `NO_TOKEN`."""


class ChimeraConfig(EagleConfig):
    """EAGLE-1's fields under a model type of its own."""

    model_type = "draftsmith_chimera"


class Chimera(Eagle):
    """An EAGLE-1 whose embeddings are encoded trigrams, and whose output passes a residual block.

    Args:
        config: sizes.
    """

    config_class: type[EagleConfig] = ChimeraConfig

    def __init__(self, config: EagleConfig) -> None:
        super().__init__(config)
        D = config.hidden_size
        self.trigram_in = nn.Linear(3 * D, D, bias=False)
        self.trigram_out = nn.Linear(D, D, bias=False)
        self.residual = nn.Linear(D, D)
        self.post_init()

    @classmethod
    def for_target(cls, *args: Any, **kwargs: Any) -> Chimera:
        """See :meth:`Eagle.for_target`. What is added to an EAGLE-1 begins as nothing."""
        drafter = super().for_target(*args, **kwargs)
        assert isinstance(drafter, Chimera)
        for added in (drafter.trigram_out.weight, drafter.residual.weight, drafter.residual.bias):
            nn.init.zeros_(added)
        return drafter

    def head_inputs(self, output: Tensor) -> Tensor:
        """The residual decoding head without the target's own matrix, [..., D]."""
        return output + F.silu(self.residual(output))

    def fed_back(self, output: Tensor) -> Tensor:
        """See :meth:`EagleBase.fed_back`: what training compares with the target's feature is what stands for it."""
        return self.head_inputs(output)

    def encoded(self, tokens: Tensor, before: Tensor) -> Tensor:
        """Encode trigrams.

        Args:
            tokens: int64 [...], target ids.
            before: int64 [..., 2], the token before each and the one before that, or `NO_TOKEN`.

        Returns:
            [..., D].
        """
        ids = torch.cat([tokens[..., None], before], dim=-1)
        embedded = self.embed(ids.clamp(min=0)) * (ids != NO_TOKEN)[..., None].to(self.dtype)
        encoded: Tensor = self.trigram_out(F.silu(self.trigram_in(embedded.flatten(-2))))
        return embedded[..., 0, :] + encoded

    def embed_text(self, batch: PackedBatch) -> Tensor:
        """See :meth:`EagleBase.embed_text`."""
        before_T2 = torch.stack([batch.input_ids, _one_before(batch)], dim=-1)
        return self.encoded(batch.input_ids.roll(-1), before_T2)

    def embed_fed(self, batch: PackedBatch, rollout: Rollout, step: int) -> Tensor:
        """See :meth:`EagleBase.embed_fed`."""
        anchors_A = rollout.anchors
        text_A2 = torch.stack([_one_before(batch)[anchors_A], batch.input_ids[anchors_A]], dim=-1)
        history = torch.cat([text_A2, rollout.tokens], dim=-1)[:, step : step + 3]
        return self.encoded(history[:, 2], history[:, :2].flip(-1))

    def embed_pairs(self, pairs: Emitted) -> Tensor:
        """See :meth:`EagleBase.embed_pairs`."""
        return self.encoded(pairs.tokens_BE, pairs.features[BEFORE])

    def start_in_steps(self, opening: Opening) -> Generator[None, None, CacheState]:
        """See :meth:`Drafter.start_in_steps`; each pair is given the tokens before it."""
        first_B1 = opening.first_B[:, None]
        nothing_B1 = torch.full_like(first_B1, NO_TOKEN)
        prompt = _with_before(opening.prompt, torch.cat([nothing_B1, first_B1], dim=1))
        return (yield from super().start_in_steps(replace(opening, prompt=prompt)))

    def advance(self, state: CacheState, emitted: Emitted) -> CacheState:  # type: ignore[override]
        """See :meth:`EagleBase.advance`; each pair is given the tokens before it."""
        root_B, before_B2 = state.pending.last(BEFORE)
        return super().advance(state, _with_before(emitted, torch.stack([before_B2[:, 0], root_B], dim=1)))

    def expander(self, state: CacheState, cycle: Cycle, limits: DraftLimits) -> ChimeraDraft:  # type: ignore[override]
        """See :class:`ChimeraDraft`."""
        return ChimeraDraft(self, state, cycle, limits.draft_length)


class ChimeraDraft(FeatureDraft):
    """One draft: every node knows the two tokens above it."""

    def __init__(self, drafter: Chimera, state: CacheState, cycle: Cycle, depth: int) -> None:
        super().__init__(drafter, state, cycle, depth)
        self._chimera = drafter
        root_B, before_B2 = state.pending.last(BEFORE)
        self._above_BM2 = torch.stack([root_B, before_B2[:, 0]], dim=-1)[
            :, None
        ]  # of the last layer's nodes: own token first

    def embed_nodes(self, tokens_BM: Tensor, above_BM: Tensor) -> Tensor:
        """See :meth:`FeatureDraft.embed_nodes`."""
        before_BM2 = self._above_BM2.gather(1, above_BM[..., None].expand(-1, -1, 2))
        self._above_BM2 = torch.stack([tokens_BM, before_BM2[..., 0]], dim=-1)
        return self._chimera.encoded(tokens_BM, before_BM2)


def _one_before(batch: PackedBatch) -> Tensor:
    """int64 [T]: the token before each packed one, or `NO_TOKEN` where its text begins."""
    documents, ids = batch.document_ids, batch.input_ids.roll(1)
    begins = documents != documents.roll(1)
    begins[:1] = True
    return ids.masked_fill(begins, NO_TOKEN)


def _with_before(pairs: Emitted, last_B2: Tensor) -> Emitted:
    """Pairs that know the two tokens before each: ``last_B2`` holds those before the first pair, the nearer one last."""
    history = torch.cat([last_B2, pairs.tokens_BE], dim=1)
    E = pairs.tokens_BE.shape[1]
    before_BE2 = torch.stack([history[:, 1 : E + 1], history[:, :E]], dim=-1)
    return replace(pairs, features={**pairs.features, BEFORE: before_BE2})


class ChimeraFamily(EagleFamily):
    """An EAGLE-1 over encoded trigrams, with a residual decoding head (Chimera, arXiv 2402.15758). It has the settings of an EAGLE-1."""

    kind: ClassVar[type[Eagle]] = Chimera


FAMILY = Family(
    name="chimera",
    drafter=Chimera,
    config=ChimeraConfig,
    settings=ChimeraFamily,
    about=About(
        title="Chimera",
        what="A draft head of one decoder layer over encoded trigrams and the target's states "
        "([Chimera](https://arxiv.org/abs/2402.15758))",
        reads="the last hidden states",
    ),
)
