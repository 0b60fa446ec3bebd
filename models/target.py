"""The target seam: a frozen Hugging Face causal LM behind a few doors that every family opens alike.

Owns loading, the doors (embed, forward, final norm, logits), layer names, and the refusal by name of what cannot be supported.
Knows no drafter, no tree and no cache layout.

Layer names: ``last.pre_norm`` is the last decoder block's output *before* the final norm (Hugging Face's ``hidden_states[-1]`` is
after it); ``layer.{i}.output`` is the output of the 0-based decoder block i.

Shape legend: B batch rows, N new tokens, S cache slots, T tokens, D hidden, V vocabulary.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.cache_utils import Cache, DynamicCache

from draftsmith.models.fingerprint import checkpoint_fingerprint, module_fingerprint

PRE_NORM = "last.pre_norm"
_FINAL_NORMS = ("norm", "ln_f", "final_layer_norm", "final_layernorm", "norm_f")
_BLOCKS = ("layers", "h", "blocks")


@dataclass(frozen=True)
class TargetOutput:
    """States of one forward.

    Attributes:
        pre_norm: [B, N, D], the last block's output before the final norm.
        normed: [B, N, D], the same after it.
        layers: the other layers asked for, by name, [B, N, D] each.
    """

    pre_norm: Tensor
    normed: Tensor
    layers: dict[str, Tensor] = field(default_factory=dict)

    def feature(self, name: str) -> Tensor:
        """[B, N, D], a layer by name."""
        return self.pre_norm if name == PRE_NORM else self.layers[name]


class TargetEnds(nn.Module):
    """A target's frozen ends without its trunk: embedding, final norm and head.

    Enough to train a drafter from cached states: a 70B trunk is never loaded for it.
    """

    def __init__(self, model: PreTrainedModel, name: str, fingerprint: str) -> None:
        super().__init__()
        self.name = name
        self.fingerprint = fingerprint
        base = _text_base(model)
        self.embedding = model.get_input_embeddings()
        self.norm = _child(base, _FINAL_NORMS, "final norm")
        self.head = model.get_output_embeddings()
        if self.head is None:
            raise ValueError(f"{name}: {type(model).__name__} has no output embeddings; a causal LM is needed")
        config = model.config.get_text_config()
        self.hidden_size = int(config.hidden_size)
        self.vocab_size = int(self.head.weight.shape[0])
        self._soft_cap: float | None = getattr(config, "final_logit_softcapping", None)
        # Cohere multiplies its logits, Granite divides them.
        self._logit_scale = float(getattr(config, "logit_scale", None) or 1.0) / float(
            getattr(config, "logits_scaling", None) or 1.0
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
    ) -> TargetEnds:
        """Load the ends alone from a local directory or a hub id.

        With ``adapter`` the whole target is loaded and its ends are kept, since an adapter may reach them.

        Raises:
            ValueError: the path holds no model, or its family is not supported.
        """
        folder = resolve(path, revision)
        if adapter is not None:
            return Target.load(
                path, dtype=str(dtype).removeprefix("torch."), device=device, revision=revision, adapter=adapter
            ).ends
        config = AutoConfig.from_pretrained(folder)
        short = copy.deepcopy(config)
        text = short.get_text_config()
        text.num_hidden_layers = 1
        if getattr(text, "layer_types", None):
            text.layer_types = text.layer_types[:1]
        with _quiet("transformers"):  # the trunk is left out on purpose; no need to warn of it
            model = AutoModelForCausalLM.from_pretrained(folder, config=short, dtype=dtype)
        return cls(model, name=path, fingerprint=checkpoint_fingerprint(folder)).to(device)

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
        """The dtype of the norm's weights, and so of the states."""
        return next(self.norm.parameters()).dtype

    def embed(self, ids: Tensor) -> Tensor:
        """Token ids int64 [...] -> input embeddings [..., D]."""
        return self.embedding(ids)

    def final_norm(self, hidden: Tensor) -> Tensor:
        """Pre-norm states [..., D] -> normed [..., D]."""
        return self.norm(hidden.to(self.dtype))

    def logits(self, normed: Tensor) -> Tensor:
        """Normed states [..., D] -> logits [..., V], with the model's own bias, scale and soft-cap."""
        logits = self.head(normed)
        if self._logit_scale != 1.0:
            logits = logits * self._logit_scale
        if self._soft_cap is not None:
            logits = torch.tanh(logits / self._soft_cap) * self._soft_cap
        return logits


class Target(nn.Module):
    """The frozen model, whole.

    Raises:
        ValueError: the family cannot decode trees (recurrent state, positional bias in attention, chunked attention, an encoder),
            named in the message.
    """

    def __init__(self, model: PreTrainedModel, name: str, fingerprint: str) -> None:
        super().__init__()
        _refuse_unsupported(model, name)
        self.model = model.eval().requires_grad_(False)
        self.name = name
        self.fingerprint = fingerprint
        self.config = model.config.get_text_config()
        self.ends = TargetEnds(model, name, fingerprint)
        self._base = _text_base(model)
        self._blocks = list(_child(self._base, _BLOCKS, "decoder blocks").children())
        self._caught: dict[str, Tensor] = {}
        self.ends.norm.register_forward_pre_hook(self._catch_pre_norm)
        self._additive_mask = getattr(self.config, "_attn_implementation", "sdpa") == "eager"
        kinds = set(getattr(self.config, "layer_types", None) or ())
        window = getattr(self.config, "sliding_window", None)
        self.window: int | None = window if not kinds or "sliding_attention" in kinds else None
        self._mask_kinds: tuple[str, ...] = ()
        self._prove(sorted(kinds))

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
    ) -> Target:
        """Load a target from a local directory or a hub id.

        Args:
            path: directory or hub id.
            dtype: a torch dtype's name, such as float32 or bfloat16.
            device: where to put it, such as cpu or cuda:0; ignored with ``device_map``.
            device_map: accelerate's placement over several devices, such as auto.
            revision: the hub's revision.
            adapter: a PEFT adapter on top, merged into the weights; it is part of the fingerprint.
            quantization: ``8bit`` or ``4bit`` (bitsandbytes).

        Raises:
            ValueError: bad path, dtype or device, or an unsupported family.
        """
        folder = resolve(path, revision)
        config = AutoConfig.from_pretrained(folder)
        arguments: dict[str, Any] = {"dtype": as_dtype(dtype)}
        if getattr(config.get_text_config(), "attn_logit_softcapping", None):
            # Transformers' SDPA path leaves attention soft-caps out (Gemma-2), which would change the target.
            arguments["attn_implementation"] = "eager"
        if device_map is not None:
            arguments["device_map"] = device_map
        if quantization is not None:
            arguments["quantization_config"] = _quantization(quantization)
        model = AutoModelForCausalLM.from_pretrained(folder, use_safetensors=True, **arguments)
        fingerprint = checkpoint_fingerprint(folder)
        if adapter is not None:
            if quantization is not None:
                raise ValueError(
                    "an adapter is merged into the weights, which 8bit and 4bit weights do not allow; drop one of the two"
                )
            from peft import PeftModel

            adapter_folder = resolve(adapter, None)
            model = PeftModel.from_pretrained(model, str(adapter_folder)).merge_and_unload()
            fingerprint = f"{fingerprint[:32]}{checkpoint_fingerprint(adapter_folder)[:32]}"
        if device_map is None and quantization is None:
            nn.Module.to(model, as_device(device))
        return cls(model, name=path, fingerprint=fingerprint)

    @classmethod
    def from_model(cls, model: PreTrainedModel, name: str = "in-memory") -> Target:
        """Wrap a model that is already in memory; its fingerprint hashes every parameter."""
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
    def max_positions(self) -> int | None:
        """The longest context in tokens, or None where the config names none."""
        longest = getattr(self.config, "max_position_embeddings", None)
        return None if longest is None else int(longest)

    def logits(self, normed: Tensor) -> Tensor:
        """Normed states [..., D] -> logits [..., V]."""
        return self.ends.logits(normed)

    @torch.inference_mode()
    def forward(
        self,
        input_ids: Tensor,
        *,
        cache: Cache,
        positions: Tensor,
        mask: Tensor | None,
        key_positions: Tensor | None = None,
        layers: tuple[str, ...] = (),
    ) -> TargetOutput:
        """One forward over new tokens with a cache and an explicit mask.

        Args:
            input_ids: int64 [B, N].
            cache: where keys and values of the new tokens go, and those of S visible slots come from.
            positions: int64 [B, N].
            mask: bool [B, 1, N, S], True where a new token sees a slot; None for one new token that sees every slot, which attention
                kernels do faster.
            key_positions: int64 [B, S], the position of each slot's token; needed where the target has a sliding window.
            layers: names of further layers to return.
        """
        with self._catching(layers):
            output = self._base(
                input_ids=input_ids,
                position_ids=positions,
                attention_mask=None if mask is None else self._masks(mask, positions, key_positions),
                past_key_values=cache,
                use_cache=True,
            )
        return self._output(output.last_hidden_state, layers)

    @torch.inference_mode()
    def prefix(self, input_ids: Tensor, layers: tuple[str, ...] = ()) -> TargetOutput:
        """One plain causal forward without a cache. ``input_ids``: int64 [B, T], padded on the right, where padding harms nobody."""
        with self._catching(layers):
            output = self._base(input_ids=input_ids, use_cache=False)
        return self._output(output.last_hidden_state, layers)

    def _output(self, normed: Tensor, layers: tuple[str, ...]) -> TargetOutput:
        return TargetOutput(
            self._caught[PRE_NORM], normed, {name: self._caught[name] for name in layers if name != PRE_NORM}
        )

    def _catch_pre_norm(self, module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        self._caught[PRE_NORM] = inputs[0]

    @contextmanager
    def _catching(self, layers: tuple[str, ...]) -> Iterator[None]:
        handles = [
            self._block(name).register_forward_hook(
                lambda _module, _inputs, output, name=name: self._keep(name, output)
            )
            for name in layers
            if name != PRE_NORM
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _keep(self, name: str, output: Tensor | tuple[Tensor, ...]) -> None:
        self._caught[name] = output if isinstance(output, Tensor) else output[0]

    def _block(self, name: str) -> nn.Module:
        parts = name.split(".")
        if (
            len(parts) != 3
            or parts[0] != "layer"
            or parts[2] != "output"
            or not parts[1].isdigit()
            or int(parts[1]) >= len(self._blocks)
        ):
            raise ValueError(
                f"unknown layer {name!r}; use {PRE_NORM!r} or 'layer.i.output' with i from 0 to {len(self._blocks) - 1} for {self.name}"
            )
        return self._blocks[int(parts[1])]

    def _masks(self, mask: Tensor, positions: Tensor, key_positions: Tensor | None) -> Tensor | dict[str, Tensor]:
        windowed = mask
        if self.window is not None:
            if key_positions is None:
                raise ValueError("a target with a sliding window needs key_positions")
            near = positions[:, None, :, None] - key_positions[:, None, None, :] < self.window
            windowed = mask & near
        if not self._mask_kinds:
            return self._as_mask(windowed)
        return {kind: self._as_mask(windowed if kind == "sliding_attention" else mask) for kind in self._mask_kinds}

    def _as_mask(self, mask: Tensor) -> Tensor:
        if not self._additive_mask:
            return mask
        return torch.zeros_like(mask, dtype=self.dtype).masked_fill_(~mask, torch.finfo(self.dtype).min)

    @torch.inference_mode()
    def _prove(self, kinds: list[str]) -> None:
        """Check once, by equality, that our doors give the model's own logits; finds how it takes masks on the way."""
        ids = torch.arange(6, device=self.device)[None] % self.ends.vocab_size
        expected = self.model(input_ids=ids, use_cache=False).logits.float()
        scale = expected.abs().max().clamp(min=1.0)
        tolerance = scale * (1e-3 if self.dtype == torch.float32 else 5e-2)
        choices = [tuple(kinds), ()] if kinds else [()]
        for self._mask_kinds in choices:
            try:
                got = self._probe(ids)
            except (AttributeError, TypeError, KeyError):  # this family takes its masks the other way
                continue
            if torch.allclose(got, expected, rtol=0.0, atol=float(tolerance)):
                return
        raise ValueError(
            f"{self.name}: {type(self.model).__name__} is not supported: run through an explicit tree mask it does not give its own "
            "logits (it may build its attention in a way that tree masks cannot express); please report the model's name"
        )

    def _probe(self, ids: Tensor) -> Tensor:
        """Logits [1, T, V] of a prefill of two tokens and a packed tree of two branches, of which the second is the text."""
        cache, total = DynamicCache(), ids.shape[1]
        positions = torch.arange(total, device=ids.device)[None]
        causal = torch.ones(total, total, dtype=torch.bool, device=ids.device).tril()[None, None]
        first = self.forward(
            ids[:, :2],
            cache=cache,
            positions=positions[:, :2],
            mask=causal[:, :, :2, :2],
            key_positions=positions[:, :2],
        )
        decoy = (ids[:, 2:3] + 1) % self.ends.vocab_size
        tree = torch.cat([decoy, ids[:, 2:]], dim=1)
        tree_positions = torch.cat([positions[:, 2:3], positions[:, 2:]], dim=1)
        tree_mask = torch.zeros(1, 1, total - 1, total + 1, dtype=torch.bool, device=ids.device)
        tree_mask[..., :2] = True
        tree_mask[..., 0, 2] = True
        tree_mask[..., 1:, 3:] = causal[..., 2:, 2:]
        second = self.forward(
            tree,
            cache=cache,
            positions=tree_positions,
            mask=tree_mask,
            key_positions=torch.cat([positions[:, :2], tree_positions], 1),
        )
        return torch.cat([self.logits(first.normed), self.logits(second.normed[:, 1:])], dim=1).float()


def load_tokenizer(path: str, revision: str | None = None) -> PreTrainedTokenizerBase:
    """The tokenizer of a model directory or hub id; code shipped with it is never run.

    Raises:
        ValueError: there is none.
    """
    folder = resolve(path, revision)
    if not any((folder / name).exists() for name in ("tokenizer.json", "tokenizer_config.json", "tokenizer.model")):
        raise ValueError(f"{path} holds no tokenizer (tokenizer.json); give the directory of a complete model")
    return AutoTokenizer.from_pretrained(folder)


def resolve(path: str, revision: str | None = None) -> Path:
    """The local directory of a model: the path itself, one of the embedded models (``embedded:target``), or a hub id's snapshot.

    Raises:
        ValueError: neither a directory nor a hub id that can be had.
    """
    if path.startswith("embedded:"):
        from importlib.resources import files

        folder = Path(str(files("draftsmith.embedded").joinpath(path.removeprefix("embedded:"))))
        if not (folder / "config.json").exists():
            raise ValueError(f"there is no embedded model {path!r}; use embedded:target or embedded:draft_lm")
        return folder
    local = Path(path)
    if local.is_dir():
        if not any((local / name).exists() for name in ("config.json", "adapter_config.json")):
            raise ValueError(
                f"{path} is a directory without config.json; give a Hugging Face model directory or a hub id"
            )
        return local
    if local.is_absolute() or path.startswith(".") or path.count("/") != 1:
        raise ValueError(
            f"model path {path!r} does not exist; give a Hugging Face model directory or a hub id such as org/name"
        )
    try:
        return Path(
            snapshot_download(path, revision=revision, ignore_patterns=["*.bin", "*.pt", "*.pth", "*.gguf", "*.onnx"])
        )
    except (OSError, ValueError) as error:
        raise ValueError(f"{path!r} is neither a local directory nor a hub id that can be had: {error}") from error


def as_dtype(name: str) -> torch.dtype:
    """A torch dtype from its name.

    Raises:
        ValueError: not a floating dtype that targets are run in.
    """
    dtypes = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "float64": torch.float64}
    if name not in dtypes:
        raise ValueError(f"dtype {name!r} is not one of {', '.join(dtypes)}")
    return dtypes[name]


def as_device(name: str) -> torch.device:
    """A torch device that is really there.

    Raises:
        ValueError: the name is no device, or this machine has none such.
    """
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ValueError(f"device {name!r} is not a device; use cpu, cuda, cuda:1, mps ...") from error
    there = {"cpu": 1, "cuda": torch.cuda.device_count(), "mps": int(torch.backends.mps.is_available()), "meta": 0}
    if (device.index or 0) >= there.get(device.type, 0):
        raise ValueError(
            f"device {name!r} is not there: this machine has {there['cuda']} CUDA device(s); use --device cpu or one that it has"
        )
    return device


def _quantization(kind: str) -> Any:
    from transformers import BitsAndBytesConfig

    if kind not in ("8bit", "4bit"):
        raise ValueError(f"quantization {kind!r} is not one of 8bit, 4bit")
    return BitsAndBytesConfig(load_in_8bit=kind == "8bit", load_in_4bit=kind == "4bit")


def _text_base(model: PreTrainedModel) -> nn.Module:
    base = model.base_model
    return getattr(base, "language_model", base)


def _child(base: nn.Module, names: tuple[str, ...], what: str) -> nn.Module:
    for name in names:
        found = getattr(base, name, None)
        if isinstance(found, nn.Module):
            return found
    raise ValueError(f"{type(base).__name__} is not supported: its {what} is not at any of {', '.join(names)}")


def _refuse_unsupported(model: PreTrainedModel, name: str) -> None:
    config, kind = model.config.get_text_config(), type(model).__name__
    kinds = set(getattr(config, "layer_types", None) or ())
    reasons = {
        "keeps a recurrent state, which cannot follow several branches of a tree": getattr(model, "_is_stateful", False)
        or bool(kinds & {"linear_attention", "mamba", "recurrent", "conv"}),
        "is an encoder-decoder": getattr(config, "is_encoder_decoder", False),
        "attends in chunks, which tree masks cannot follow": "chunked_attention" in kinds,
        "adds a position bias to attention (ALiBi), which tree positions cannot express": getattr(
            config, "alibi", False
        )
        or config.model_type in ("bloom", "mpt"),
        "runs flash attention, which takes no tree mask; load it with sdpa or eager": "flash"
        in str(getattr(config, "_attn_implementation", "")),
    }
    for reason, holds in reasons.items():
        if holds:
            raise ValueError(f"{name}: {kind} ({config.model_type}) is not supported as a target: it {reason}")


@contextmanager
def _quiet(name: str) -> Iterator[None]:
    logger = logging.getLogger(name)
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)
