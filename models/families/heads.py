"""Draft heads: each step of a draft has a small network over the target's last state, and an output head.

One family with switches. ``network`` says what a step computes (`models/families/head_steps.py`): Medusa, blockwise heads, Hydra or the
MLP speculator. ``head`` says whose output head follows: the target's own, frozen; one of the drafter's for all steps; or one for each step.
Steps that share a head can differ by a matrix of low rank: step k scores with W + U M_k, where U [Vd, r] is one for all steps. At large
vocabularies that is affordable, while K heads of their own cost K V D weights. With ``prefix_layer``, a layer over all states of the text
comes first (`models/families/prefix_layer.py`).

Owns the drafter, its draft, its settings and its record. Knows nothing of losses, trees or verification.

Shape legend: B batch rows, M nodes of a layer, A anchors, K draft steps.
D hidden, E outputs of a step, r rank, S state, Vd draft vocabulary.
"""

from __future__ import annotations

from collections.abc import Generator, Mapping
from typing import Any, ClassVar, Literal, get_args

import torch
from torch import Tensor, nn

from draftsmith.models.drafters.draft_records import CacheState, Cycle, Emitted, Opening, RootState
from draftsmith.models.drafters.drafter_config import DrafterConfig
from draftsmith.models.drafters.family import About, DrafterFamily, Family
from draftsmith.models.drafters.parallel_draft import ParallelDraft
from draftsmith.models.drafters.rollout import PackedBatch, Rollout
from draftsmith.models.families.eagle_config import LayerConfig, layer_sizes
from draftsmith.models.families.from_fields import FromFields
from draftsmith.models.families.head_steps import (
    READ_BY,
    BlockwiseSteps,
    DraftSteps,
    HydraSteps,
    MedusaSteps,
    MlpSteps,
    Network,
)
from draftsmith.models.families.prefix_layer import PrefixLayer
from draftsmith.models.families.target_head import TargetHead
from draftsmith.models.files.field_rules import COUNT, COUNT_OR_ZERO, FLAG, PARTS, Rule
from draftsmith.models.target.key_values import KeyValues
from draftsmith.models.target.target import PRE_NORM, TargetEnds
from draftsmith.models.tree.limits import DraftLimits
from draftsmith.models.tree.steps import result_of

HeadOwner = Literal["target", "shared", "per_step"]
HeadsState = RootState | CacheState
DEFAULT_RANK = 64
PREFIX_FIELDS = tuple(name for name in LayerConfig.rules if name not in DrafterConfig.rules)


class HeadsConfig(DrafterConfig):
    """The fields of draft heads.

    Attributes:
        network: of a step: ``medusa``, ``blockwise``, ``hydra`` or ``mlp``.
        head: the output head: ``target``, ``shared`` by all steps, or ``per_step``.
        rank: r of what steps with a common head add to it; 0 adds nothing.
        num_blocks: layers of a step, of ``medusa`` and ``hydra``.
        inner_size: I, width of the hidden layer of ``blockwise``, and of the state of ``mlp``.
        tied: in ``mlp``, one embedding and norm serve all steps.
        scale_input: in ``mlp``, the target's state is normed before the first step.
        prefix_layer: sizes of a Llama layer that reads all states of the text first, the fields of :class:`LayerConfig`; None for none.
    """

    model_type = "draftsmith_heads"
    rules: ClassVar[Mapping[str, Rule]] = {
        **DrafterConfig.rules,
        "network": (lambda value: value in get_args(Network), f"one of {', '.join(get_args(Network))}"),
        "head": (lambda value: value in get_args(HeadOwner), f"one of {', '.join(get_args(HeadOwner))}"),
        "rank": COUNT_OR_ZERO,
        "num_blocks": PARTS,
        "inner_size": COUNT,
        "tied": FLAG,
        "scale_input": FLAG,
        "prefix_layer": (
            lambda value: value is None or isinstance(value, dict),
            "an object of a layer's sizes, or null",
        ),
    }

    def __init__(
        self,
        network: Network = "medusa",
        head: HeadOwner = "target",
        rank: int = 0,
        num_blocks: int = 1,
        inner_size: int | None = None,
        tied: bool = True,
        scale_input: bool = False,
        prefix_layer: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.prefix_layer = prefix_layer
        self.network, self.head, self.rank = network, head, rank
        self.num_blocks, self.tied, self.scale_input = num_blocks, tied, scale_input
        self.inner_size = self.hidden_size if inner_size is None else inner_size

    @property
    def layer(self) -> LayerConfig | None:
        """The prefix layer's config."""
        if self.prefix_layer is None:
            return None
        return LayerConfig(hidden_size=self.hidden_size, vocab_size=self.vocab_size, **self.prefix_layer)

    @property
    def output_size(self) -> int:
        """E: what a step gives to its head."""
        return self.inner_size if self.network == "mlp" else self.hidden_size

    def fault(self) -> str:
        """See :meth:`DrafterConfig.fault`."""
        unset = {"num_blocks": 1, "inner_size": self.hidden_size, "tied": True, "scale_input": False}
        for name, value in unset.items():
            if self.network not in READ_BY[name] and getattr(self, name) != value:
                return (
                    f"{name} {getattr(self, name)} and network {self.network!r}, but the field is for {' and '.join(READ_BY[name])} alone: "
                    f"use {value}"
                )
        if self.head == "target" and self.output_size != self.hidden_size:
            return (
                f"inner_size {self.inner_size} and head 'target', whose rows have {self.hidden_size} numbers: use that inner_size, or "
                "head 'shared' or 'per_step'"
            )
        if self.head == "per_step" and self.rank:
            return (
                f"rank {self.rank} and head 'per_step', but only steps that share a head add a matrix to it: use rank 0"
            )
        if unknown := sorted((self.prefix_layer or {}).keys() - set(PREFIX_FIELDS)):
            return f"prefix_layer with {', '.join(unknown)}, which no layer has"
        if self.layer is not None:
            self.layer.check("prefix_layer")
        return super().fault()


class HeadsDrafter(TargetHead, FromFields):
    """A network and an output head for each step (arXiv:1811.03115, 2401.10774, 2402.05109, 2404.19124)."""

    config_class = HeadsConfig
    config: HeadsConfig

    def __init__(self, config: HeadsConfig) -> None:
        super().__init__(config)
        K, E, r = config.num_draft_steps, config.output_size, config.rank
        self.borrows_head = config.head == "target"
        self.prefix = None if config.layer is None else PrefixLayer(config.layer.llama())
        self.steps = steps_of(config)
        num_heads = {"target": 0, "shared": 1, "per_step": K}[config.head]
        self.heads = nn.ModuleList(nn.Linear(E, config.num_draft_tokens, bias=False) for _ in range(num_heads))
        self.mix = nn.ModuleList(nn.Linear(E, r, bias=False) for _ in range(K if r else 0))
        self.difference = nn.Linear(r, config.num_draft_tokens, bias=False) if r else None
        self.post_init()

    @torch.no_grad()
    def begin_fresh(self) -> None:
        """Steps as their kind begins them; heads from the target's, or at random as those of the MLP speculator; no difference yet."""
        self.steps.reset()
        if self.prefix is not None:
            self.prefix.reset()
        if self.difference is not None:
            self.difference.weight.zero_()
        for weight in self.heads.parameters():
            if self.config.network == "mlp":
                weight.normal_(std=self.config.inner_size**-0.5)
            else:
                weight.copy_(self.target_rows())

    @property
    def max_draft_steps(self) -> int:
        """As many as there are steps."""
        return self.config.num_draft_steps

    @property
    def has_one_head(self) -> bool:
        """See :attr:`Drafter.has_one_head`."""
        return self.config.head != "per_step"

    @property
    def head_weight(self) -> Tensor:
        """[Vd, E]: the target's head, or the drafter's own.

        Raises:
            ValueError: each step has a head of its own.
        """
        if self.borrows_head:
            return self.target_rows()
        return self._own_head(0) if self.has_one_head else super(TargetHead, self).head_weight

    def step_weight(self, step: int) -> Tensor:
        """See :meth:`Drafter.step_weight`."""
        return self.head_weight if self.has_one_head else self._own_head(step)

    def _own_head(self, number: int) -> Tensor:
        weight = self.heads[number].weight
        assert isinstance(weight, Tensor)
        return weight

    @property
    def correction_weight(self) -> Tensor | None:
        """See :attr:`Drafter.correction_weight`: U of the differences."""
        return None if self.difference is None else self.difference.weight

    @property
    def reads_drafted(self) -> bool:
        """See :attr:`Drafter.reads_drafted`."""
        return self.steps.reads_tokens

    def passes(self, draft_length: int) -> int:
        """See :meth:`Drafter.passes`: one where no step reads a token, since all are computed at once."""
        return draft_length if self.steps.reads_tokens else 1

    def weights_read_once(self) -> tuple[Tensor, ...]:
        """See :meth:`Drafter.weights_read_once`: in a draft of several passes, what only one step has."""
        if not self.has_one_head or not self.steps.reads_tokens:
            return ()
        prefix = () if self.prefix is None else self.prefix.parameters()
        return (*self.steps.read_once(), *self.mix.parameters(), *prefix)

    def key_values(self) -> tuple[KeyValues, ...]:
        """See :meth:`Drafter.key_values`: those of the prefix layer."""
        layer = self.config.layer
        if layer is None:
            return ()
        return (KeyValues(2 * layer.num_key_value_heads * layer.head_dim * self.dtype.itemsize),)

    def needs_host(self) -> str:
        """See :meth:`Drafter.needs_host`."""
        follows = self.prefix is not None and self.prefix.rotation.follows_length
        return "the rotary factors of the prefix layer follow the length" if follows else ""

    def context(self, states: Tensor) -> Tensor:
        """The target's states [..., D] after its final norm, in this drafter's dtype."""
        return self.ends.final_norm(states).to(self.dtype)

    def head_inputs(self, state: Tensor, step: int) -> Tensor:
        """What the head of a step is applied to.

        Args:
            state: [..., S], of the step.
            step: counted from 0.

        Returns:
            [..., E], or [..., E + r] with differences.
        """
        outputs = self.steps.outputs(state, step)
        return outputs if self.difference is None else torch.cat([outputs, self.mix[step](outputs)], dim=-1)

    def teacher_forced(self, batch: PackedBatch, rollout: Rollout) -> Tensor:
        """See :meth:`Drafter.teacher_forced`."""
        if self.prefix is None:
            context_AD = self.context(batch.hidden[PRE_NORM][rollout.anchors])
        else:
            context_AD = self.prefix.over_text(self.context(batch.hidden[PRE_NORM]), batch, rollout.anchors)
        state_AS = self.steps.begin(context_AD)
        inputs = []
        for step in range(rollout.tokens.shape[1]):
            state_AS = self.read(rollout.tokens[:, step], state_AS, step)
            inputs.append(self.head_inputs(state_AS, step))
        return torch.stack(inputs)

    def read(self, tokens: Tensor, state: Tensor, step: int) -> Tensor:
        """The state [..., S] of a step, from the tokens int64 [...] before it and the state before that."""
        return self.steps.read(tokens, self.embed(tokens), state, step) if self.steps.reads_tokens else state

    def start(self, opening: Opening) -> HeadsState:
        """The context and root after the prompt."""
        return result_of(self.start_in_steps(opening))

    def start_in_steps(self, opening: Opening) -> Generator[None, None, HeadsState]:
        """See :meth:`Drafter.start_in_steps`: chunks of the prompt matter to a prefix layer alone."""
        if self.prefix is None:
            return self._at(opening.prompt)
        return (yield from self.prefix.start_in_steps(opening, self._states))

    @property
    def reads_last_only(self) -> bool:
        """See :attr:`Drafter.reads_last_only`."""
        return self.prefix is None

    def advance(self, state: HeadsState, emitted: Emitted) -> HeadsState:  # type: ignore[override]
        """The last emitted token and the state that predicted it; what a prefix layer has not read is pending."""
        return CacheState(state.cache, emitted) if isinstance(state, CacheState) else self._at(emitted)

    def expander(self, state: HeadsState, cycle: Cycle, limits: DraftLimits) -> HeadsDraft | ParallelHeadsDraft:  # type: ignore[override]
        """See :class:`HeadsDraft` and :class:`ParallelHeadsDraft`."""
        if isinstance(state, CacheState):
            assert self.prefix is not None
            state = RootState(self.prefix.at_last(state, cycle, self._states), state.pending.root_B)
        if self.steps.reads_tokens:
            return HeadsDraft(self, state)
        return ParallelHeadsDraft(self, state, limits.draft_length)

    def follow(self, state: HeadsState, cycle: Cycle, limits: DraftLimits) -> HeadsState:  # type: ignore[override]
        """See :meth:`Drafter.follow`: keys and values of a prefix layer only."""
        if isinstance(state, CacheState):
            self.expander(state, cycle, limits)
        return state

    def _at(self, emitted: Emitted) -> RootState:
        root_B, state_BD = emitted.last(PRE_NORM)
        return RootState(self.context(state_BD), root_B)

    def _states(self, pairs: Emitted) -> Tensor:
        return self.context(pairs.features[PRE_NORM])


def steps_of(config: HeadsConfig) -> DraftSteps:
    """Make the networks of all steps.

    Args:
        config: of the drafter.

    Returns:
        The module.
    """
    D, K, inner_size = config.hidden_size, config.num_draft_steps, config.inner_size
    if config.network == "medusa":
        return MedusaSteps(D, K, config.num_blocks)
    if config.network == "blockwise":
        return BlockwiseSteps(D, K, inner_size)
    if config.network == "hydra":
        return HydraSteps(D, K, config.num_blocks)
    return MlpSteps(D, config.vocab_size, K, inner_size, config.tied, config.scale_input)


class HeadsDraft:
    """One draft of steps that read the tokens before them.

    Args:
        drafter: whose steps.
        state: the last emitted tokens, and the target's normed states before them.
    """

    def __init__(self, drafter: HeadsDrafter, state: RootState) -> None:
        self.root_B, self.target_ids = state.root_B, drafter.to_target_ids
        self._drafter, self._step = drafter, 0
        self._state_BMS = drafter.steps.begin(state.context_BD)[:, None]

    def begin(self) -> Tensor:
        """See :class:`Expander`."""
        return self._next(self.root_B[:, None])

    def extend(self, tokens_BM: Tensor, above_BM: Tensor) -> Tensor:
        """See :class:`Expander`."""
        self._step += 1
        if self._state_BMS.shape[1] > 1:
            self._state_BMS = self._state_BMS.gather(1, above_BM[..., None].expand(-1, -1, self._state_BMS.shape[-1]))
        return self._next(tokens_BM)

    def _next(self, tokens_BM: Tensor) -> Tensor:
        """[B, M, Vd]: what follows some tokens, whose parents' states are at hand."""
        drafter, state_BMS = self._drafter, self._state_BMS.expand(-1, tokens_BM.shape[1], -1)
        self._state_BMS = drafter.read(tokens_BM, state_BMS, self._step)
        return drafter.logits(drafter.head_inputs(self._state_BMS, self._step), self._step)


class ParallelHeadsDraft(ParallelDraft):
    """One draft of steps that read no token: all are made in one pass, and nodes of one depth have the same continuations.

    Args:
        drafter: whose steps.
        state: as of :class:`HeadsDraft`.
        draft_length: layers that may be asked for.
    """

    def __init__(self, drafter: HeadsDrafter, state: RootState, draft_length: int) -> None:
        super().__init__(drafter, state.root_B)
        self._heads, self._context_BD, self._draft_length = drafter, state.context_BD, draft_length

    def slot_logits(self) -> Tensor:
        """See :meth:`ParallelDraft.slot_logits`."""
        state_BS = self._heads.steps.begin(self._context_BD)
        inputs = [self._heads.head_inputs(state_BS, step) for step in range(self._draft_length)]
        return self._heads.rollout_logits(torch.stack(inputs)).transpose(0, 1)


class HeadsFamily(DrafterFamily):
    """Draft heads over the target's last state: Medusa, blockwise heads, Hydra, the MLP speculator. `num_steps` sets how many.

    Args:
        network: what a step computes. `medusa` (arXiv 2401.10774) and `blockwise` (arXiv 1811.03115) draft all tokens at once; each
            step of `hydra` (arXiv 2402.05109) and `mlp` (arXiv 2404.19124) also reads the tokens before it.
        head: the output head: the target's own, frozen (`target`); one of the drafter's for all steps (`shared`); or one for each
            step (`per_step`), which costs a whole head a step. Null takes `target`; of `mlp`, `shared` if tied, else `per_step`.
        rank: steps that share a head each add a matrix of this rank to it; 0 adds nothing. Null takes 64 with the target's head, else 0.
        num_blocks: layers of a step, of `medusa` and `hydra`.
        inner_size: width of the hidden layer of `blockwise`, and of the state of `mlp`; null takes that of the target's MLPs for
            `blockwise`, and the target's hidden size for `mlp`.
        tied: one embedding, norm and projection serve all steps of `mlp`.
        scale_input: `mlp` norms the target's state before its first step.
        prefix_layer: a decoder layer over all of the target's states comes first, as in Hydra++; it has keys and values of its own.
        draft_vocab_size: score only this many tokens, the most frequent labelled ones of the training samples; null scores all.
    """

    kind = HeadsDrafter

    def __init__(
        self,
        network: Network = "medusa",
        head: HeadOwner | None = None,
        rank: int | None = None,
        num_blocks: int = 1,
        inner_size: int | None = None,
        tied: bool = True,
        scale_input: bool = False,
        prefix_layer: bool = False,
        draft_vocab_size: int | None = None,
    ) -> None:
        self.prefix_layer = prefix_layer
        self.network, self.head, self.rank, self.num_blocks = network, head, rank, num_blocks
        self.inner_size, self.tied, self.scale_input = inner_size, tied, scale_input
        self.draft_vocab_size = draft_vocab_size

    def build(
        self, ends: TargetEnds, draft_token_ids: Tensor | None, num_steps: int, tokenizer_fingerprint: str
    ) -> HeadsDrafter:
        """See DrafterFamily.build.

        Raises:
            ValueError: settings that do not go together.
        """
        own: HeadOwner = "shared" if self.tied else "per_step"
        head = self.head or ("target" if self.network != "mlp" else own)
        sizes = layer_sizes(ends)
        inner_size = self.inner_size
        if inner_size is None and self.network == "blockwise":
            inner_size = sizes["intermediate_size"]
        return HeadsDrafter.for_target(
            ends,
            network=self.network,
            head=head,
            rank=self.rank if self.rank is not None else DEFAULT_RANK if head == "target" else 0,
            num_blocks=self.num_blocks,
            inner_size=inner_size,
            tied=self.tied,
            scale_input=self.scale_input,
            prefix_layer=sizes if self.prefix_layer else None,
            draft_token_ids=draft_token_ids,
            num_draft_steps=num_steps,
            tokenizer_fingerprint=tokenizer_fingerprint,
        )


FAMILY = Family(
    name="headsdrafter",
    drafter=HeadsDrafter,
    config=HeadsConfig,
    settings=HeadsFamily,
    about=About(
        title="Heads drafter",
        what="Draft heads over the target's last state, one for each step ([Medusa](https://arxiv.org/abs/2401.10774) and its relatives)",
    ),
    layouts=("draftsmith.export.layouts.heads.medusa", "draftsmith.export.layouts.heads.mlp_speculator"),
)
