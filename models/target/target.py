"""The target seam: a frozen Hugging Face causal LM behind a few doors that every family opens alike.

Owns the doors (embed, forward, final norm, logits) and their loading. Knows no drafter, no tree and no cache layout. How a family takes
masks and positions is in :mod:`draftsmith.models.trunk.trunk`, the proof that it does in :mod:`draftsmith.models.trunk.proof`.

Shape legend: B batch rows, N new tokens, S cache slots, T tokens, D hidden, V vocabulary.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers import GenerationConfig, PreTrainedModel
from transformers.cache_utils import Cache

from draftsmith.models.files.device_and_dtype import as_dtype, resolved_device, resolved_dtype
from draftsmith.models.files.end_tokens import end_tokens, read_end_tokens
from draftsmith.models.files.fingerprint import module_fingerprint
from draftsmith.models.files.loading import load_causal_lm
from draftsmith.models.slots.row_caches import RowCaches
from draftsmith.models.slots.slot_cache import SlotCache
from draftsmith.models.target.ends import TargetEnds
from draftsmith.models.trunk.known_models import refuse_unsupported
from draftsmith.models.trunk.merged import merge, split
from draftsmith.models.trunk.proof import few_logits, prove, same_logits
from draftsmith.models.trunk.riders import Carried
from draftsmith.models.trunk.trunk import PRE_NORM, TargetOutput

__all__ = ["PRE_NORM", "Target", "TargetEnds", "TargetOutput"]


class Target(nn.Module):
    """The frozen model, whole.

    Args:
        model: a causal LM; it is put into evaluation mode, and its parameters are frozen.
        name: for messages.
        fingerprint: sha256 of its files; empty if unknown.
        end_token_ids: end a reply where neither config of the model names any: the tokenizer's.
        context: the longest text in tokens where the config's own is wrong.

    Raises:
        ValueError: the family cannot be decoded with drafts (positional bias in attention, chunked attention, an encoder), or gives other
            numbers than its own generation; named in the message.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        name: str,
        fingerprint: str,
        end_token_ids: tuple[int, ...] = (),
        context: int | None = None,
    ) -> None:
        super().__init__()
        refuse_unsupported(model, name)
        self._saved_end_tokens = end_token_ids
        self.model = model.eval().requires_grad_(False)
        self.name = name
        self.fingerprint = fingerprint
        self.config = model.config.get_text_config()
        self.ends = TargetEnds(model, name, fingerprint, end_token_ids=end_token_ids, context=context)
        self._trunk = self.ends.trunk = prove(model, name, self.ends.logits)
        self._is_merged = False

    @classmethod
    def load(
        cls,
        path: str,
        dtype: str = "float32",
        device: str = "cpu",
        device_map: str | None = None,
        revision: str | None = None,
        adapter: str | None = None,
        quantization: str | None = None,
        trust_remote_code: bool = False,
        context: int | None = None,
    ) -> Target:
        """Load a target from a local directory or a hub id.

        Args:
            path: directory or hub id.
            dtype: a torch dtype's name, such as float32 or bfloat16; auto: the checkpoint's own on CUDA, float32 elsewhere.
            device: where to put it, such as cpu or cuda:0; auto: CUDA where there is one, else the CPU. Ignored with ``device_map``.
            device_map: accelerate's placement over several devices, such as auto.
            revision: the hub's revision.
            adapter: a PEFT adapter on top, merged into the weights; it is part of the fingerprint.
            quantization: ``8bit`` or ``4bit`` (bitsandbytes).
            trust_remote_code: whether Python files that come with the target may run.
            context: the longest text in tokens where the config's own is wrong; see :mod:`draftsmith.models.target.context`.

        Returns:
            The target, frozen, in evaluation mode.

        Raises:
            ValueError: bad path, dtype or device, an unsupported family, or code that may not run. Also for weights that do not fit the
                config, and for logits that are not finite.
        """
        device = resolved_device(device)
        model, fingerprint = load_causal_lm(
            path,
            as_dtype(resolved_dtype(dtype, path, device, revision, trust_remote_code)),
            device,
            device_map,
            revision,
            adapter,
            quantization,
            trust_remote_code=trust_remote_code,
        )
        ends = read_end_tokens(path, revision, trust_remote_code=trust_remote_code)
        return cls(model, path, fingerprint, ends, context)

    @classmethod
    def from_model(cls, model: PreTrainedModel, name: str = "in-memory") -> Target:
        """Wrap a model that is already in memory; its fingerprint hashes every parameter.

        Args:
            model: a causal LM; it is frozen.
            name: for messages.

        Returns:
            The target.

        Raises:
            ValueError: as :class:`Target`.
        """
        return cls(model, name=name, fingerprint=module_fingerprint(model))

    @property
    def device(self) -> torch.device:
        """Where token ids go in."""
        return next(self.ends.embedding.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the states."""
        return self.ends.dtype

    @property
    def window(self) -> int | None:
        """How many tokens a layer with a sliding window sees; None where no layer has one."""
        return self._trunk.window

    @property
    def rereads_past(self) -> int | None:
        """The text length past which the model reads its whole text again; see :mod:`draftsmith.models.trunk.rope`."""
        return self._trunk.rereads_past

    @property
    def factors_follow_length(self) -> bool:
        """Whether rotary factors change with the length of the text; see :mod:`draftsmith.models.trunk.rope`."""
        return bool(self._trunk.ropes)

    @property
    def keeps_state(self) -> bool:
        """Whether layers keep a recurrent state: then drafts are chains, and rows are read one by one."""
        return self._trunk.keeps_state

    @property
    def max_positions(self) -> int | None:
        """The longest context in tokens, or None where the config names none."""
        return self.ends.max_positions

    @property
    def eos_token_ids(self) -> tuple[int, ...]:
        """The ids that end a reply, as :mod:`draftsmith.models.files.end_tokens` finds them; empty where nothing names one.

        A model in memory has no tokenizer to ask.
        """
        return end_tokens(self.model.generation_config, self.model.config) or self._saved_end_tokens

    def forget_settings(self) -> None:
        """Give the model a generation config that names end tokens and asks for nothing else."""
        self.model.generation_config = GenerationConfig(eos_token_id=list(self.eos_token_ids) or None)

    def new_cache(self, capacity: int, num_rows: int) -> SlotCache | RowCaches:
        """Make what a batch's text is cached in.

        Args:
            capacity: slots of each row: tokens of text and draft.
            num_rows: of the batch.

        Returns:
            An empty cache, of the kind that the model reads with.
        """
        return self._trunk.new_cache(capacity, num_rows, self.device)

    def logits(self, normed: Tensor) -> Tensor:
        """Apply the head.

        Args:
            normed: [..., D], states after the final norm.

        Returns:
            [..., V].
        """
        return self.ends.logits(normed)

    def forward(
        self,
        input_ids: Tensor,
        *,
        cache: Cache,
        positions: Tensor,
        mask: Tensor | None,
        key_positions: Tensor | None = None,
        layers: tuple[str, ...] = (),
        text_lengths: Tensor | None = None,
        ends: Tensor | None = None,
        riders: Carried | None = None,
    ) -> TargetOutput:
        """Run one forward over new tokens with a cache and an explicit mask.

        Args:
            input_ids: int64 [B, N].
            cache: where keys and values of the new tokens go, and those of S visible slots come from.
            positions: int64 [B, N].
            mask: bool [B, 1, N, S], True where a new token sees a slot. None for one new token that sees every slot: attention kernels do
                that faster.
            key_positions: int64 [B, S], the position of each slot's token; needed where the target has a sliding window.
            layers: names of further layers to return.
            text_lengths: int64 [B, N], how long the row's text is when each new token is read: for a prompt's tokens all of it. Rotary
                factors that change with length are chosen by it. None: up to the token itself.
            ends: int64 [B], slots from here on are seen by no new token of a row; given where far more slots are in view than hold text,
                so that attention can skip them.
            riders: what rides behind some of the tokens. ``positions``, ``mask`` and the slots that the cache is aimed at then have a row
                for each rider behind those of the tokens.

        Returns:
            The states of the new tokens.

        Raises:
            ValueError: an unknown layer, or no ``key_positions`` where they are needed.
        """
        return self._trunk.forward(
            input_ids,
            cache=cache,
            positions=positions,
            mask=mask,
            key_positions=key_positions,
            layers=layers,
            text_lengths=text_lengths,
            ends=ends,
            riders=riders,
        )

    def prefix(self, input_ids: Tensor, layers: tuple[str, ...] = (), read: Tensor | None = None) -> TargetOutput:
        """Run one plain causal forward without a cache.

        Args:
            input_ids: int64 [B, T], padded on the right, where padding harms nobody.
            layers: names of further layers to return.
            read: int64 [B], how many tokens of each row are read at once, as decoding does with a prompt. Those behind are read as decoding
                would read them. It matters to rotary factors that change with length. None: all T, of every row.

        Returns:
            The states of all tokens.

        Raises:
            ValueError: an unknown layer.
        """
        return self._trunk.prefix(input_ids, layers, read)

    def merge(self) -> None:
        """Merge matrices that read the same states, and norms, where the model gives the same logits then; done once.

        Weights are moved, not doubled. What the model says changes by rounding at most. It can no longer be trained, nor divided between
        processes. So only commands that decode ask for it. A model that keeps a recurrent state stays as it is.
        """
        if self._is_merged or self.device.type == "meta" or self.keeps_state:
            return
        self._is_merged = True
        own = few_logits(self._trunk, self.model, self.ends.logits)
        parts = [*self._trunk.blocks, self._trunk.norm]
        if not merge(parts):
            return
        try:
            is_same = same_logits(few_logits(self._trunk, self.model, self.ends.logits), own)
        except (AttributeError, RuntimeError, TypeError):  # the family calls its matrices in another way
            is_same = False
        if not is_same:
            split(parts)

    def tap(self, layers: tuple[str, ...]) -> None:
        """Make the states of layers available to forwards; see :meth:`draftsmith.models.trunk.trunk.Trunk.tap`.

        Raises:
            ValueError: the model has no such layer.
        """
        self._trunk.tap(layers)

    @property
    def skips_slots(self) -> bool:
        """Whether attention over a cache of fixed shapes skips slots on the target's device."""
        return self._trunk.skips_slots_on(self.device)

    def attend_to_all_slots(self) -> None:
        """Skip no slots of the cache from now on; see :func:`draftsmith.models.slots.attention.skipping`."""
        self._trunk.skips_slots = False

    def check_layer(self, name: str) -> None:
        """Check that the target has a layer.

        Args:
            name: such as ``layer.12.output``.

        Raises:
            ValueError: it has none of this name; the message says which it has.
        """
        self._trunk.check_layer(name)
