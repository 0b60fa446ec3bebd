"""An ordinary small causal LM as a drafter.

Owns how a language model that shares the target's tokenizer drafts: through the doors of `Target`, with
keys and values of its own. It reads nothing of the target but its tokens. Knows nothing of verification, nor of training: any causal LM
will do, and `configs/draft_lm.yaml` distils one towards its target.

Shape legend: B batch rows, E fresh tokens, M drafted nodes of a layer, N new tokens of a forward, T prompt tokens.
S cache slots, D hidden, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Generator
from pathlib import Path

import torch
from torch import Tensor
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from draftsmith.models.drafters.draft_records import CacheState, Cycle, Emitted, Opening
from draftsmith.models.drafters.draft_slots import DraftSlots
from draftsmith.models.drafters.drafter import Drafter
from draftsmith.models.drafters.drafter_config import DrafterConfig
from draftsmith.models.drafters.rollout import PackedBatch, Rollout
from draftsmith.models.files.adapter_files import read_json
from draftsmith.models.files.fingerprint import tokenizer_fingerprint
from draftsmith.models.files.finite import is_finite
from draftsmith.models.files.loading import load_tokenizer
from draftsmith.models.files.model_folder import resolve
from draftsmith.models.files.pretrained import read_config
from draftsmith.models.slots.slot_cache import SlotCache
from draftsmith.models.target.key_values import KeyValues, key_values_of
from draftsmith.models.target.target import Target, TargetEnds
from draftsmith.models.tree.limits import DraftLimits
from draftsmith.models.tree.mask import slot_positions
from draftsmith.models.tree.steps import result_of
from draftsmith.models.trunk.forwards import read_chunks
from draftsmith.models.trunk.reader import within_context


class LMDrafter(Drafter):
    """A causal LM that drafts for a larger one with the same tokenizer (arXiv:2211.17192).

    Vocabularies may differ in their padded rows. Tokens that the target has not are never proposed; tokens that the LM has not are read
    as its last one. Texts beyond the LM's context are drafted for badly, but decoded exactly.

    Args:
        lm: the draft model.
        tokenizer: fingerprint of its tokenizer; empty if unknown.

    Raises:
        ValueError: it keeps a recurrent state.
    """

    def __init__(self, lm: Target, tokenizer: str = "") -> None:
        if lm.keeps_state:
            raise ValueError(
                f"{lm.name} keeps a recurrent state, which a draft LM cannot take back; it can be a target, but choose a draft LM whose "
                "layers all attend"
            )
        super().__init__(
            DrafterConfig(
                hidden_size=lm.ends.hidden_size, vocab_size=lm.ends.vocab_size, tokenizer_fingerprint=tokenizer
            )
        )
        self.lm = lm

    @property
    def features(self) -> tuple[str, ...]:
        """None: it reads tokens."""
        return ()

    @property
    def num_draft_tokens(self) -> int:
        """Those of its tokens that the target has, too."""
        return min(self.config.vocab_size, self.ends.vocab_size)

    def attach(self, ends: TargetEnds) -> Drafter:
        """See :meth:`Drafter.attach`. Any target with the same tokenizer will do; :meth:`check_tokenizer` compares the two."""
        self.borrow(ends)
        return self

    def to_decode(self, device: torch.device) -> LMDrafter:
        """See :meth:`Drafter.to_decode`."""
        super().to_decode(device)
        self.lm.merge()
        return self

    def check_tokenizer(self, fingerprint: str) -> None:
        """Check that the target has the LM's tokenizer.

        Args:
            fingerprint: of the target's tokenizer; empty if unknown.

        Raises:
            ValueError: both fingerprints are known and differ.
        """
        own = self.config.tokenizer_fingerprint
        if own and fingerprint and own != fingerprint:
            raise ValueError(
                f"the draft LM {self.lm.name!r} has another tokenizer ({own[:12]}) than the target ({fingerprint[:12]}); token ids would "
                "not mean the same; use an LM of the target's own model family, with its tokenizer"
            )

    def needs_host(self) -> str:
        """See :meth:`Drafter.needs_host`."""
        return f"the rotary factors of {self.lm.name} follow the length" if self.lm.factors_follow_length else ""

    def key_values(self) -> tuple[KeyValues, ...]:
        """See :meth:`Drafter.key_values`: the LM's own."""
        return key_values_of(self.lm)

    @property
    def head_weight(self) -> Tensor:
        """[V, D], the LM's own."""
        return self.lm.ends.head_weight

    def teacher_forced(self, batch: PackedBatch, rollout: Rollout) -> Tensor:
        """Not for this family.

        Raises:
            ValueError: always.
        """
        raise ValueError(
            "an ordinary draft LM is not trained from the target's states; distil it towards the target with configs/draft_lm.yaml, or "
            "train it as any language model on the target's replies"
        )

    def start(self, opening: Opening) -> CacheState:
        """Read the prompts; the first emitted token is pending."""
        return result_of(self.start_in_steps(opening))

    def start_in_steps(self, opening: Opening) -> Generator[None, None, CacheState]:
        """See :meth:`Drafter.start_in_steps`."""
        spare = 1 + max(opening.limits.max_fed, opening.limits.draft_length + 1)
        cache = SlotCache(opening.room + spare, self.lm.config.num_hidden_layers)
        prompt = opening.prompt
        # Shorter prompts have their root and padding behind them here; the first draft writes over both.
        tokens_BT = torch.cat([opening.first_B[:, None], prompt.tokens_BE[:, :-1]], dim=1)
        chunks = read_chunks(self.lm, cache, self.known(tokens_BT), prompt.counts_B, chunk=opening.chunk)
        for number, _ in enumerate(chunks):
            if (number + 1) * opening.chunk < tokens_BT.shape[1]:
                yield
        return CacheState(cache, prompt.last_only(opening.num_pending))

    def advance(self, state: CacheState, emitted: Emitted) -> CacheState:  # type: ignore[override]
        """What was emitted is pending until the next draft."""
        return CacheState(state.cache, emitted)

    def expander(self, state: CacheState, cycle: Cycle, limits: DraftLimits) -> LMDraft:  # type: ignore[override]
        """See :class:`LMDraft`."""
        return LMDraft(self, state, cycle)

    def follow(self, state: CacheState, cycle: Cycle, limits: DraftLimits) -> CacheState:  # type: ignore[override]
        """See :meth:`Drafter.follow`: the pending tokens are read, and nothing is scored."""
        LMDraft(self, state, cycle).read_pending()
        return state

    def known(self, tokens: Tensor) -> Tensor:
        """Map target ids to ids that the LM can embed.

        Args:
            tokens: int64, any shape.

        Returns:
            int64, the same shape.
        """
        return tokens.clamp(max=next(self.lm.ends.embedding.parameters()).shape[0] - 1)

    def shared_logits(self, normed: Tensor) -> Tensor:
        """Score the tokens that the target has, too.

        Args:
            normed: [..., D], the LM's normed states.

        Returns:
            Logits [..., V].
        """
        return self.lm.logits(normed)[..., : self.ends.vocab_size]


class LMDraft:
    """One draft: the pending tokens up to the root first, then layer by layer of nodes."""

    def __init__(self, drafter: LMDrafter, state: CacheState, cycle: Cycle) -> None:
        self._drafter = drafter
        self._pending = state.pending
        self._slots = DraftSlots(state.cache, cycle, state.pending.tokens_BE.shape[1], ahead=1)
        self._last_B1 = state.pending.counts_B[:, None] - 1
        self.root_B = state.pending.tokens_BE.gather(1, self._last_B1).squeeze(1)
        self._depth = -1
        self._depths: list[Tensor] = []

    def target_ids(self, draft_ids: Tensor) -> Tensor:
        """See :class:`Expander`: the same ids, since both models count tokens alike."""
        return draft_ids

    def begin(self) -> Tensor:
        """See :class:`Expander`: what follows the root, once all pending tokens are read."""
        normed_BED = self.read_pending()
        last_B11 = self._last_B1[..., None]
        return self._drafter.shared_logits(normed_BED.gather(1, last_B11.expand(-1, -1, normed_BED.shape[-1])))

    def read_pending(self) -> Tensor:
        """Read all pending tokens: [B, E, D], their normed states."""
        tokens_BE = self._pending.tokens_BE[:, : self._slots.num_fresh]
        positions_BE = self._slots.aim_fresh(self._pending.counts_B)
        return self._run(tokens_BE, positions_BE, self._slots.text_mask(positions_BE))

    def extend(self, tokens_BM: Tensor, above_BM: Tensor) -> Tensor:
        """See :class:`Expander`: what follows new nodes."""
        self._depth += 1
        self._depths.append(torch.full_like(tokens_BM, self._depth))
        mask_B1MS = self._slots.aim_nodes(above_BM)
        positions_B1 = self._slots.lengths_B[:, None] + self._depth
        return self._drafter.shared_logits(self._run(tokens_BM, positions_B1.expand(tokens_BM.shape), mask_B1MS))

    def _run(self, tokens_BN: Tensor, positions_BN: Tensor, mask_B1NS: Tensor | None) -> Tensor:
        """[B, N, D], normed states of new tokens at the slots that were aimed at."""
        lm, cache = self._drafter.lm, self._slots.cache
        key_positions_BS = None
        if lm.window is not None:
            key_positions_BS = self._key_positions()
            if mask_B1NS is None:  # what a windowed model makes of none is its own affair
                mask_B1NS = torch.ones(
                    1, 1, tokens_BN.shape[1], cache.window, dtype=torch.bool, device=tokens_BN.device
                )
        return lm(
            self._drafter.known(tokens_BN),
            cache=cache,
            positions=within_context(lm, positions_BN),
            mask=mask_B1NS,
            key_positions=key_positions_BS,
        ).normed

    def _key_positions(self) -> Tensor:
        """int64 [B, S]: the position of what lies at each visible slot: text, then nodes."""
        lengths_B, window = self._slots.lengths_B, self._slots.cache.window
        if not self._depths:
            return torch.arange(window, device=lengths_B.device).expand(lengths_B.shape[0], -1)
        return slot_positions(torch.cat(self._depths, dim=1), lengths_B, window)


def load_draft_lm(
    path: str,
    dtype: str = "float32",
    device: str = "cpu",
    adapter: str | None = None,
    trust_remote_code: bool = False,
) -> LMDrafter:
    """Load a causal LM as a drafter, with its tokenizer's fingerprint.

    Args:
        path: directory, hub id or ``embedded:draft_lm``; a PEFT adapter's directory, whose config names its base, also does.
        dtype: of its weights.
        device: where to put it.
        adapter: a PEFT adapter to merge into it.
        trust_remote_code: whether Python files that come with it may run.

    Returns:
        The drafter in evaluation mode, attached to nothing.

    Raises:
        ValueError: bad path, dtype or device, an unsupported family, no tokenizer, or an adapter that names no base. Also for code that
            may not run, and for what is no causal LM of Transformers (a head exported for a serving engine, for instance).
    """
    folder = resolve(path)
    if not (folder / "config.json").is_file():
        if adapter is not None:
            raise ValueError(f"{path} is an adapter itself; give its base model and {adapter!r}, or this one alone")
        path, adapter = _base_of(folder), str(folder)
    check_architecture(resolve(path), trust_remote_code)
    lm = Target.load(path, dtype, device, adapter=adapter, trust_remote_code=trust_remote_code)
    _refuse_non_finite(lm)
    tokenizer = load_tokenizer(path, trust_remote_code=trust_remote_code)
    return LMDrafter(lm, tokenizer_fingerprint(tokenizer)).eval()


def _base_of(adapter: Path) -> str:
    base = read_json(adapter / "adapter_config.json").get("base_model_name_or_path")
    if not isinstance(base, str) or not base:
        raise ValueError(
            f"{adapter / 'adapter_config.json'} names no base model (base_model_name_or_path); give the base model's directory and the "
            "adapter beside it"
        )
    return base


def _refuse_non_finite(lm: Target) -> None:
    """A draft LM with a NaN in it decodes exactly all the same, at one token a step: nobody would see it.

    Raises:
        ValueError: naming the weight.
    """
    for name, weight in lm.model.named_parameters():
        if weight.is_floating_point() and not is_finite(weight.detach()):
            raise ValueError(f"the draft LM {lm.name!r} holds NaN or infinity in {name}; give a whole checkpoint")


def check_architecture(folder: Path, trust_remote_code: bool = False) -> None:
    """Check that a folder holds a causal LM. Whatever another module lacks of the LM would be random numbers.

    Args:
        folder: of the model.
        trust_remote_code: whether Python files of the folder may run.

    Raises:
        ValueError: the config in the folder names no causal LM, of Transformers or of code that may run.
    """
    config = read_config(folder, trust_remote_code)
    known = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(config.model_type)
    named = config.architectures or [str(known)]
    by_own_code = trust_remote_code and "AutoModelForCausalLM" in (getattr(config, "auto_map", None) or {})
    if known not in named and not by_own_code:
        raise ValueError(
            f"{folder} holds {config.model_type!r} with architecture {named[0]!r}, which is no causal LM of transformers; give a draft LM, "
            "or a drafter as training wrote it"
        )
