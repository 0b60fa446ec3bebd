"""A target's frozen ends without its trunk: embedding, final norm and head.

Owns their doors and how they are loaded without the trunk. Knows no drafter, no decoding and no layer between the ends.

Shape legend: D hidden, V vocabulary.
"""

from __future__ import annotations

import copy
import itertools
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedConfig, PreTrainedModel

from draftsmith.models.files.end_tokens import end_tokens, read_end_tokens
from draftsmith.models.files.field_rules import POSITIVE, check_fields
from draftsmith.models.files.loading import load_causal_lm, target_fingerprint
from draftsmith.models.files.model_folder import resolve_model
from draftsmith.models.files.pretrained import check_tensors, language_model_class, read_config, read_part
from draftsmith.models.target.context import context_of, refuse_past_table
from draftsmith.models.trunk.known_models import final_norm, refuse_unsupported, text_base
from draftsmith.models.trunk.trunk import Trunk

_SCALES = ("final_logit_softcapping", "logit_scale", "logits_scaling")


class TargetEnds(nn.Module):
    """Enough of a target to train a drafter from cached states: a 70B trunk is never loaded for it.

    Args:
        model: with embedding, final norm and head; its trunk may be shortened.
        name: what the target was asked for by.
        fingerprint: of the whole checkpoint, the trunk included.
        config: the text config where the model's own does not tell the truth, being that of a shortened trunk.
        end_token_ids: end a reply where neither config of the model names any: the tokenizer's.
        context: the longest text in tokens where the config's own is wrong.

    Attributes:
        name: as above.
        fingerprint: as above.
        config: the target's own text config, as its checkpoint has it: ``num_hidden_layers`` counts the whole trunk, also where
            none was loaded. Drafters read rope, heads, norm epsilon and the number of layers from it.
        hidden_size: D.
        vocab_size: V, rows of the head.
        eos_token_ids: what ends the target's replies.
        max_positions: the longest context in tokens, None where the config names none.
        logit_scale: what the model multiplies its logits by, mostly 1.

    Raises:
        ValueError: the model has no head, or one of another width; its norm is at no known name; or a length or scale of its config
            is wrong.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        name: str,
        fingerprint: str,
        config: PreTrainedConfig | None = None,
        end_token_ids: tuple[int, ...] = (),
        context: int | None = None,
    ) -> None:
        super().__init__()
        self.name = name
        self.fingerprint = fingerprint
        self.config: PreTrainedConfig = model.config.get_text_config() if config is None else config
        self.trunk: Trunk | None = None
        self.max_positions = context_of(self.config, context)
        refuse_past_table(text_base(model), self.max_positions, name)
        self.embedding = model.get_input_embeddings()
        self.norm = final_norm(model)
        self.head = model.get_output_embeddings()
        if self.head is None:
            raise ValueError(f"{name}: {type(model).__name__} has no output embeddings; a causal LM is needed")
        self.hidden_size = int(self.config.hidden_size)
        width = int(getattr(self.head, "in_features", self.hidden_size))
        if width != self.hidden_size:
            raise ValueError(
                f"{name}: {type(model).__name__} is not supported: its head reads {width} numbers, its states have {self.hidden_size}"
            )
        # A weight that ZeRO-3 has divided has no shape of its own.
        self.vocab_size = int(getattr(self.head, "out_features", self.head.weight.shape[0]))
        self.eos_token_ids = end_tokens(model.generation_config, model.config) or end_token_ids
        _check_scales(self.config, name)
        self._soft_cap: float | None = getattr(self.config, "final_logit_softcapping", None)
        # Cohere multiplies its logits, Granite divides them.
        self.logit_scale = float(getattr(self.config, "logit_scale", None) or 1.0) / float(
            getattr(self.config, "logits_scaling", None) or 1.0
        )
        self.requires_grad_(False)

    @classmethod
    def load(
        cls,
        path: str,
        dtype: torch.dtype = torch.float32,
        device: str = "cpu",
        revision: str | None = None,
        adapter: str | None = None,
        trust_remote_code: bool = False,
        context: int | None = None,
    ) -> TargetEnds:
        """Load the ends alone from a local directory or a hub id.

        Only an ``adapter`` that reaches the ends needs the whole target, which it is then merged into. Of the trunk's tensors the names
        and shapes are checked, since what is trained on these ends will run on that trunk.

        Args:
            path: directory, hub id or ``embedded:target``.
            dtype: of the weights.
            device: where to put them.
            revision: the hub's revision of the model.
            adapter: a PEFT adapter to merge into the model.
            trust_remote_code: whether Python files that come with the model may run.
            context: the longest text in tokens where the config's own is wrong.

        Returns:
            The ends, frozen.

        Raises:
            ValueError: the path holds no model, its family is not supported, or its weights do not fit its config. Also for a model that
                needs code that may not run.
        """
        folder = resolve_model(path, revision)
        config = read_config(folder, trust_remote_code)
        kind = language_model_class(config, folder)
        with _quiet("transformers"):  # the trunk is left out on purpose; no need to warn of it
            check_tensors(kind, folder, trust_remote_code)
            model = read_part(kind, folder, _end_names, trust_remote_code, config=_of_one_layer(config), dtype=dtype)
        fingerprint = target_fingerprint(path, revision, adapter)
        ends = read_end_tokens(path, revision, trust_remote_code=trust_remote_code)
        if adapter is not None:
            from draftsmith.models.files.adapter_files import adapter_folder, reaches

            refuse_unsupported(model, path)
            if reaches(adapter_folder(adapter), _end_names(model)):
                merged, fingerprint = load_causal_lm(
                    path, dtype, device, revision=revision, adapter=adapter, trust_remote_code=trust_remote_code
                )
                return cls(merged, path, fingerprint, end_token_ids=ends, context=context)
        return cls(model, path, fingerprint, config.get_text_config(), ends, context).to(device)

    @property
    def head_weight(self) -> Tensor:
        """[V, D], the head's matrix."""
        return self.head.weight

    @property
    def device(self) -> torch.device:
        """Where the head lies."""
        return self.head.weight.device

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the states: that of the norm's weights, or of the embedding's where the norm has none (OLMo, NanoChat)."""
        return next(itertools.chain(self.norm.parameters(), self.embedding.parameters())).dtype

    def embed(self, ids: Tensor) -> Tensor:
        """Look up input embeddings.

        Args:
            ids: int64 [...].

        Returns:
            [..., D].
        """
        return self.embedding(ids)

    def final_norm(self, hidden: Tensor) -> Tensor:
        """Apply the final norm.

        Args:
            hidden: [..., D], states before the norm.

        Returns:
            [..., D], on the device of the states.
        """
        return self.norm(hidden.to(self.dtype)).to(hidden.device)

    def logits(self, normed: Tensor) -> Tensor:
        """Apply the head, with the model's own bias, scale and soft-cap.

        Args:
            normed: [..., D], states after the final norm.

        Returns:
            [..., V], on the device of the states.
        """
        # The head of a target over several devices (device_map) may lie on another.
        return self._scaled(self.head(normed).to(normed.device))

    def logits_of(self, ids: Tensor) -> Callable[[Tensor], Tensor]:
        """Take the head's rows of some tokens, so that scoring these costs no more than they are.

        A head that is no plain matrix (quantised, divided over processes, adapted) scores all tokens, and the others are dropped.

        Args:
            ids: int64 [n], of the vocabulary.

        Returns:
            A function from states after the final norm [..., D] to the logits of these tokens [..., n], on the device of the states.
        """
        if type(self.head) is not nn.Linear or type(self.head.weight) is not nn.Parameter:
            return lambda normed: self.logits(normed)[..., ids.to(normed.device)]
        rows = ids.to(self.head.weight.device)
        weight = self.head.weight[rows]
        bias = None if self.head.bias is None else self.head.bias[rows]
        return lambda normed: self._scaled(F.linear(normed.to(weight.device), weight, bias).to(normed.device))

    def _scaled(self, logits: Tensor) -> Tensor:
        if self.logit_scale != 1.0:
            logits = logits * self.logit_scale
        if self._soft_cap is not None:
            logits = torch.tanh(logits / self._soft_cap) * self._soft_cap
        return logits


def _check_scales(config: PreTrainedConfig, name: str) -> None:
    """Check that the fields by which logits are scaled are numbers."""
    scales = {field: getattr(config, field, None) for field in _SCALES}
    given = {field: value for field, value in scales.items() if value}
    check_fields(given, dict.fromkeys(_SCALES, POSITIVE), f"the config of {name}", "correct its config.json")


def _end_names(model: PreTrainedModel) -> list[str]:
    ends = (model.get_input_embeddings(), final_norm(model), model.get_output_embeddings())
    return [name for name, module in model.named_modules() if any(module is end for end in ends)]


def _of_one_layer(config: PreTrainedConfig) -> PreTrainedConfig:
    """The config with its first layer alone, of which values that differ by layer are kept as lists of one."""
    short = copy.deepcopy(config)
    text = short.get_text_config()
    count = text.num_hidden_layers
    for name, value in text.to_dict().items():
        if isinstance(value, list) and len(value) == count:
            setattr(text, name, value[:1])
    text.num_hidden_layers = 1
    if getattr(text, "num_kv_shared_layers", None):
        text.num_kv_shared_layers = 0
    return short


@contextmanager
def _quiet(name: str) -> Iterator[None]:
    logger = logging.getLogger(name)
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)
