"""Several adapters on one drafter, each request drafted for by its own.

Owns which request has which adapter: rows of a batch are drafted for in groups of one adapter, and the groups' trees are verified in one
forward of the target. Knows no family and no rule of verification: what is emitted is the target's own, whichever adapter proposed.

Shape legend: B batch rows, G rows of one group, N tree nodes, M nodes with children, E emitted tokens, V vocabulary.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from draftsmith.decode.batch import Generation
from draftsmith.decode.engine import Engine
from draftsmith.decode.ledger import Ledger
from draftsmith.decode.sampling import GenerationSettings
from draftsmith.models.drafters.draft_records import Cycle, DraftState, Emitted, Opening
from draftsmith.models.drafters.drafter import Drafter
from draftsmith.models.drafters.drafter_config import DrafterConfig
from draftsmith.models.drafters.rollout import PackedBatch, Rollout
from draftsmith.models.files.field_rules import Rule
from draftsmith.models.lora.adapted_drafter import AdaptableParts, trained_parts
from draftsmith.models.lora.lora_adapter import AdapterBond, activate, load_adapter
from draftsmith.models.slots.row_state import ReplacedRows, append_rows
from draftsmith.models.slots.slot_cache import KeptRows
from draftsmith.models.target.target import Target, TargetEnds
from draftsmith.models.tree.limits import DraftLimits
from draftsmith.models.tree.search import Expander
from draftsmith.models.tree.steps import result_of
from draftsmith.models.tree.tree import DraftTree, in_batch_order
from draftsmith.models.trunk.forwards import CHUNK
from draftsmith.models.trunk.riders import Riders


class AdapterEngine:
    """An :class:`Engine` whose requests name the adapter that drafts for them.

    Args:
        target: the frozen model.
        drafter: trained; it stays as it is.
        adapters: folders that training with ``lora`` wrote, by the names that requests use.
        limits, tokenizer, ledger, prefill_chunk: see :class:`Engine`.

    Raises:
        ValueError: an adapter of another drafter or another target, or a drafter that rides through the target.
    """

    def __init__(
        self,
        target: Target,
        drafter: Drafter,
        adapters: Mapping[str, Path],
        limits: DraftLimits | None = None,
        tokenizer: PreTrainedTokenizerBase | None = None,
        ledger: Ledger | None = None,
        prefill_chunk: int = CHUNK,
    ) -> None:
        self._engine = Engine(target, AdapterSwitch(drafter, adapters), limits, tokenizer, ledger, prefill_chunk)

    def generate(
        self,
        prompts: list[list[int]],
        settings: GenerationSettings,
        adapters: Sequence[str | None],
        on_tokens: Callable[[int, list[int]], None] | None = None,
        request_ids: list[int] | None = None,
        num_rows: int | None = None,
    ) -> list[Generation]:
        """Decode prompts of any lengths; see :meth:`Engine.generate`.

        Args:
            prompts, settings, on_tokens, request_ids, num_rows: as there.
            adapters: of each prompt, the name of its adapter, or None for the drafter as it is.

        Raises:
            ValueError: as there; or an unknown name, or not one name a prompt.
        """
        if len(adapters) != len(prompts):
            raise ValueError(
                f"{len(prompts)} prompts and {len(adapters)} adapters are given; name one for each, or None"
            )
        self._switch.assign(adapters)
        return self._engine.generate(prompts, settings, on_tokens, request_ids, num_rows=num_rows)

    def stream(
        self,
        prompts: Iterable[tuple[int, list[int], str | None]],
        settings: GenerationSettings,
        num_rows: int,
        room: int,
        on_tokens: Callable[[int, list[int]], None] | None = None,
        until: Callable[[int, list[int]], bool] | None = None,
        in_order: bool = False,
    ) -> Iterator[tuple[int, Generation]]:
        """Decode prompts from an iterator and give replies as they end; see :meth:`Engine.stream`.

        Args:
            prompts: (request id, token ids, the name of its adapter or None) of each.
            settings, num_rows, room, on_tokens, until, in_order: as there.

        Yields:
            The index of a prompt, counted from 0, and its record.

        Raises:
            ValueError: as there; or an unknown name.
        """
        self._switch.assign(())

        def assigned() -> Iterator[tuple[int, list[int]]]:
            for number, prompt, adapter in prompts:
                self._switch.assign_next(adapter)
                yield number, prompt

        yield from self._engine.stream(assigned(), settings, num_rows, room, on_tokens, until, in_order)

    @property
    def _switch(self) -> AdapterSwitch:
        assert isinstance(self._engine.drafter, AdapterSwitch)
        return self._engine.drafter


@dataclass(frozen=True)
class Group:
    """Rows that share an adapter.

    Attributes:
        adapter: its name, or None.
        rows: their numbers in the batch, in the order of ``state``.
        rows_G: int64 [G], the same on the device.
        state: the drafter's, of these rows.
    """

    adapter: str | None
    rows: list[int]
    rows_G: Tensor
    state: DraftState

    def select(self, places: Mapping[int, int]) -> Group | None:
        """The rows that remain; None where none does. ``places`` gives each of them its new number."""
        keep = [number for number, row in enumerate(self.rows) if row in places]
        if not keep:
            return None
        kept = KeptRows.of(keep, self.rows_G.device)
        rows = [places[self.rows[number]] for number in kept.order]
        state = self.state if len(keep) == len(self.rows) else self.state.select_rows(kept)
        return Group(self.adapter, rows, torch.tensor(rows, device=self.rows_G.device), state)

    def join(self, other: Group) -> Group:
        """The rows of both, which have the same adapter."""
        state = append_rows(self.state, other.state, len(self.rows), len(other.rows))
        return Group(self.adapter, self.rows + other.rows, torch.cat([self.rows_G, other.rows_G]), state)


@dataclass(frozen=True)
class SwitchState:
    """What the drafter carries from cycle to cycle.

    Attributes:
        groups: of the batch; every row is in one of them.
    """

    groups: tuple[Group, ...]

    def select_rows(self, kept: KeptRows) -> SwitchState:
        """The state of some batch rows only."""
        places = {row: place for place, row in enumerate(kept.order)}
        chosen = (group.select(places) for group in self.groups)
        return SwitchState(tuple(group for group in chosen if group is not None))

    def replace_rows(self, fresh: SwitchState, replaced: ReplacedRows) -> SwitchState:
        """Let new rows take places in the batch; each joins the group of its adapter."""
        stay = {row: row for row in range(replaced.num_rows) if row not in replaced.rows}
        staying = (group.select(stay) for group in self.groups)
        groups = {group.adapter: group for group in staying if group is not None}
        for each in fresh.groups:
            group = replace(each, rows=[replaced.rows[row] for row in each.rows], rows_G=replaced.index_R[each.rows_G])
            groups[group.adapter] = groups[group.adapter].join(group) if group.adapter in groups else group
        return SwitchState(tuple(groups.values()))


class SwitchConfig(DrafterConfig):
    """No fields of its own: what a drafter's config says is asked of the drafter below."""

    model_type = "draftsmith_adapter_switch"
    rules: ClassVar[Mapping[str, Rule]] = {}


class AdapterSwitch(Drafter):
    """A drafter with several adapters, behind the interface of one.

    Args:
        drafter: below the adapters; a copy of it that shares its weights gets them. One that is made of others has the adapters of its
            parts.
        adapters: their folders by name.

    Raises:
        ValueError: an adapter of another drafter, or adapters of one whose riders share the target's forward.
    """

    def __init__(self, drafter: Drafter, adapters: Mapping[str, Path]) -> None:
        if adapters and drafter.riders is not None:
            raise ValueError(
                f"a {type(drafter).__name__} rides through one forward of the target, in which rows cannot have adapters of their own; "
                "merge one adapter into the drafter with `draftsmith export`, and decode with that"
            )
        super().__init__(SwitchConfig())
        self.below = _sharing_weights(drafter)
        parts = trained_parts(self.below)
        self._targets = {part.config.target_fingerprint for part in parts} - {""}
        self._plain_scales = [(part.config, float(part.config.score_scale)) for part in parts]
        # Numbered inside, since adapters are stored as modules, which cannot go by every name (not by "pop", "type" or "v1.2").
        self._inside = {name: f"adapter_{number}" for number, name in enumerate(adapters)}
        self._bonds: dict[str, AdapterBond] = {}
        self._adapted: dict[str, DrafterConfig] = {}
        adaptable = AdaptableParts(self.below) if adapters else None
        for name, folder in adapters.items():
            assert adaptable is not None
            part, fingerprint = adaptable.of_adapter(folder)
            self._bonds[name] = load_adapter(part, folder, self._inside[name], fingerprint)
            self._adapted[name] = part.config
        if any(bond.target_fingerprint for bond in self._bonds.values()):
            self.below = self.below.for_any_target()  # adapters of a fine-tuned target: their own bonds count
        self._assigned: dict[int, str | None] = {}
        self._num_assigned = self._room = 0
        self._acting: str | None = None

    def assign(self, adapters: Sequence[str | None]) -> None:
        """Say which adapter drafts for each of the first prompts of the next call; the state of the last call is forgotten.

        Raises:
            ValueError: a name that was not given, or None where the drafter below belongs to another target.
        """
        self._assigned, self._num_assigned, self._room = {}, 0, 0
        for name in adapters:
            self.assign_next(name)

    def assign_next(self, name: str | None) -> None:
        """Say which adapter drafts for the prompt behind those that have one.

        Raises:
            ValueError: the name was not given, or is None where the drafter below belongs to another target.
        """
        if name is not None and name not in self._bonds:
            raise ValueError(f"adapter {name!r} is unknown; there are {', '.join(sorted(self._bonds)) or 'none'}")
        if name is None and self.is_attached and self._targets - {self.ends.fingerprint}:
            raise ValueError(
                f"a request without an adapter needs a drafter of {self.ends.name!r}, this one is of another target; name an adapter"
            )
        self._assigned[self._num_assigned] = name
        self._num_assigned += 1

    @property
    def features(self) -> tuple[str, ...]:
        """Those of the drafter below."""
        return self.below.features

    @property
    def riders(self) -> Riders | None:
        """Those of the drafter that drafts."""
        return self.below.riders

    @property
    def max_draft_steps(self) -> int | None:
        """Of the adapter that acts."""
        return self.below.max_draft_steps

    @property
    def parts(self) -> tuple[Drafter, ...] | None:
        """Of the adapter that acts."""
        return self.below.parts

    def limits_of_parts(self, limits: DraftLimits) -> DraftLimits:
        """Of the adapter that acts."""
        return self.below.limits_of_parts(limits)

    def check_depth(self, limits: DraftLimits) -> None:
        """See :meth:`Drafter.check_depth`: that of the drafter below."""
        self.below.check_depth(limits)

    @property
    def reads_choices(self) -> bool:
        """Whether the drafter below does."""
        return self.below.reads_choices

    @property
    def reads_last_only(self) -> bool:
        """Whether the drafter below does."""
        return self.below.reads_last_only

    def step_weight(self, step: int) -> Tensor:
        """Of the adapter that acts."""
        return self.below.step_weight(step)

    def attach(self, ends: TargetEnds) -> Drafter:
        """Borrow the target's ends.

        Raises:
            ValueError: an adapter was trained for another target.
        """
        for name, bond in self._bonds.items():
            if bond.target_fingerprint and ends.fingerprint and bond.target_fingerprint != ends.fingerprint:
                raise ValueError(
                    f"adapter {name!r} was trained for target {bond.target_name!r} (fingerprint {bond.target_fingerprint[:12]}), not for "
                    f"{ends.name!r} ({ends.fingerprint[:12]}); use that target, or leave the adapter out"
                )
        self.below = self.below.bound(ends)
        self.borrow(ends)
        return self

    def needs_host(self) -> str:
        """See :meth:`Drafter.needs_host`."""
        return "its adapters switch from group to group of rows"

    def check_tokenizer(self, fingerprint: str) -> None:
        """See :meth:`Drafter.check_tokenizer`."""
        self.below.check_tokenizer(fingerprint)

    def teacher_forced(self, batch: PackedBatch, rollout: Rollout) -> Tensor:
        """Not for this one.

        Raises:
            ValueError: always.
        """
        raise ValueError(
            "several adapters on one drafter are for decoding; train one with the `lora` option of DraftModule"
        )

    def expander(self, state: DraftState, cycle: Cycle, limits: DraftLimits) -> Expander:
        """Not for this one, whose rows are drafted for in groups.

        Raises:
            ValueError: always.
        """
        raise ValueError("several adapters have no expander in common; call propose")

    def start(self, opening: Opening) -> SwitchState:
        """Every row with the adapter of its prompt.

        Raises:
            ValueError: a prompt has no adapter assigned.
        """
        return result_of(self.start_in_steps(opening))

    def start_in_steps(self, opening: Opening) -> Generator[None, None, SwitchState]:
        """See :meth:`Drafter.start_in_steps`.

        Raises:
            ValueError: a prompt has no adapter assigned.
        """
        known = [index for index in opening.indices if index in self._assigned]
        if len(known) != len(opening.first_B):
            raise ValueError(
                f"{len(opening.first_B)} rows start, {len(known)} were assigned an adapter; call assign first"
            )
        names = [self._assigned.pop(index) for index in known]
        # Rows that come later may found a group, whose buffers must hold as much as those of the first.
        self._room = max(self._room, opening.room)
        groups = []
        for name in dict.fromkeys(names):
            rows = [row for row, assigned in enumerate(names) if assigned == name]
            rows_G = torch.tensor(rows, device=opening.first_B.device)
            prompt, first_B = opening.prompt.select_rows(rows_G), opening.first_B[rows_G]
            part = replace(opening, prompt=prompt, first_B=first_B, room=self._room)
            state = yield from self._acting_as(name, self.below.start_in_steps(part))
            groups.append(Group(name, rows, rows_G, state))
        return SwitchState(tuple(groups))

    def _acting_as(
        self, name: str | None, steps: Generator[None, None, DraftState]
    ) -> Generator[None, None, DraftState]:
        """Work of the drafter below under one adapter, although others act between its steps."""
        while True:
            self._take(name)
            try:
                next(steps)
            except StopIteration as end:
                state: DraftState = end.value
                return state
            yield

    def advance(self, state: SwitchState, emitted: Emitted) -> SwitchState:  # type: ignore[override]
        """Each group's state after its own tokens."""
        groups = []
        # Backwards, since the last group's adapter still acts from its draft: half as many switches a cycle.
        for group in reversed(state.groups):
            self._take(group.adapter)
            groups.append(replace(group, state=self.below.advance(group.state, emitted.select_rows(group.rows_G))))
        return SwitchState(tuple(reversed(groups)))

    def take_choices(self, state: SwitchState, tree: DraftTree, choices_BN: Tensor) -> SwitchState:  # type: ignore[override]
        """See :meth:`Drafter.take_choices`: each group's own."""
        groups = []
        for group in state.groups:
            self._take(group.adapter)
            own, choices_GN = tree.select_rows(group.rows_G), choices_BN[group.rows_G]
            groups.append(replace(group, state=self.below.take_choices(group.state, own, choices_GN)))
        return SwitchState(tuple(groups))

    def propose(self, state: SwitchState, cycle: Cycle, limits: DraftLimits) -> DraftTree:  # type: ignore[override]
        """Draft for each group in turn; one batch of trees, in the order of the rows."""
        trees = []
        for group in state.groups:
            self._take(group.adapter)
            own_cycle = cycle.select_rows(group.rows, group.rows_G)
            trees.append(self.below.propose(group.state, own_cycle, limits))
        return in_batch_order(trees, [group.rows_G for group in state.groups])

    def follow(self, state: SwitchState, cycle: Cycle, limits: DraftLimits) -> SwitchState:  # type: ignore[override]
        """Each group's state, after what was pending in it."""
        groups = []
        for group in state.groups:
            self._take(group.adapter)
            own_cycle = cycle.select_rows(group.rows, group.rows_G)
            groups.append(replace(group, state=self.below.follow(group.state, own_cycle, limits)))
        return SwitchState(tuple(groups))

    def _take(self, name: str | None) -> None:
        if name == self._acting:
            return
        self._acting = name
        activate(self.below, None if name is None else self._inside[name])
        for config, scale in self._plain_scales:
            config.score_scale = scale
        if name is not None:
            self._adapted[name].score_scale = self._bonds[name].score_scale


def _sharing_weights(drafter: Drafter) -> Drafter:
    """A copy with modules and config of its own whose weights lie in the same memory, frozen."""
    memo: dict[int, object] = {id(weight): nn.Parameter(weight.detach(), False) for weight in drafter.parameters()}
    drafters = [module for module in drafter.modules() if isinstance(module, Drafter)]
    borrowed = [each.ends for each in drafters if each.is_attached]
    models = [
        module for module in drafter.modules() if isinstance(module, Target)
    ]  # of draft LMs, which take no adapters
    memo |= {id(part): part for part in (*drafter.buffers(), *borrowed, *models)}
    return copy.deepcopy(drafter, memo)
