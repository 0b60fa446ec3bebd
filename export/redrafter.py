"""ReDrafter on disk: our layout and Apple's, each held to a strict table of names, shapes and dtypes.

Owns the two layouts, both ways, and the check that what was written is what was meant. Loaders elsewhere are lax (a
missing tensor may load in silence), so nothing here is trusted because "it loads". Knows nothing of training or of
how a drafter is measured.

Both layouts hold ``config.json`` and ``model.safetensors`` with the same tensor names. Ours adds to the config the
bond to one target and may add a draft vocabulary (tensor ``d2t``); Apple's (github.com/apple/ml-recurrent-drafter)
has neither.

Shape legend: D hidden, E exit dimension, V vocabulary, Vd draft vocabulary, K draft steps, A anchors.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from draftsmith.models.drafter import PackedBatch, Rollout
from draftsmith.models.redrafter import ReDrafter, ReDrafterConfig
from draftsmith.models.target import PRE_NORM, TargetEnds

WEIGHTS, CONFIG = "model.safetensors", "config.json"
APPLE_KEYS = ("vocab_size", "hidden_size", "exit_dim", "num_draft_layers", "num_lookback_tokens", "rnn")
_PICKLES = ("*.pt", "*.bin", "*.pth", "*.pkl")


@dataclass(frozen=True)
class TensorSpec:
    """What a tensor of a checkpoint must be; ``integer`` asks for int64, else any of float32, bfloat16, float16."""

    shape: tuple[int, ...]
    integer: bool = False

    def fits(self, tensor: Tensor) -> bool:
        """Whether shape and dtype are as they must be."""
        kinds = (torch.int64,) if self.integer else (torch.float32, torch.bfloat16, torch.float16)
        return tuple(tensor.shape) == self.shape and tensor.dtype in kinds

    def __str__(self) -> str:
        return f"{'int64' if self.integer else 'float'} {list(self.shape)}"


def tensor_table(config: ReDrafterConfig) -> dict[str, TensorSpec]:
    """Every tensor of a ReDrafter checkpoint by name, no more and no less."""
    D, E, N = config.hidden_size, config.exit_dim, config.num_draft_layers
    truncated = config.draft_vocab_size is not None and config.draft_vocab_size < config.vocab_size
    head_size = int(config.draft_vocab_size or 0) if truncated else config.vocab_size
    table = {f"lm_head.{N}.weight": TensorSpec((head_size, E))}
    for block in range(N):
        table[f"lm_head.{block}.linear.weight"] = TensorSpec((E, E))
        table[f"lm_head.{block}.linear.bias"] = TensorSpec((E,))
    if E != 2 * D:
        table |= {"input_proj.weight": TensorSpec((E, 2 * D)), "input_proj.bias": TensorSpec((E,))}
    if config.rnn:
        table |= {
            "rnn_u.weight": TensorSpec((D, D)),
            "rnn_u.bias": TensorSpec((D,)),
            "rnn_w.weight": TensorSpec((D, D)),
        }
    if truncated:
        table["d2t"] = TensorSpec((head_size,), integer=True)
    return table


def check_tensors(tensors: Mapping[str, Tensor], config: ReDrafterConfig, where: str) -> None:
    """Hold tensors to :func:`tensor_table` and to finite values, a draft vocabulary to increasing ids of the target.

    Raises:
        ValueError: naming every tensor that is missing, unknown, misshapen or not finite.
    """
    table = tensor_table(config)
    faults = [f"{name} is missing ({spec})" for name, spec in table.items() if name not in tensors]
    faults += [f"{name} is unknown" for name in tensors if name not in table]
    for name in table.keys() & tensors.keys():
        tensor = tensors[name]
        if not table[name].fits(tensor):
            kind = str(tensor.dtype).removeprefix("torch.")
            faults.append(f"{name} is {kind} {list(tensor.shape)}, not {table[name]}")
        elif not bool(torch.isfinite(tensor).all()):
            faults.append(f"{name} holds NaN or infinity")
    if "d2t" in table and not any(fault.startswith("d2t") for fault in faults):
        ids = tensors["d2t"] + torch.arange(len(tensors["d2t"]))
        if bool((ids.diff() <= 0).any()) or int(ids[0]) < 0 or int(ids[-1]) >= config.vocab_size:
            faults.append(f"d2t does not map to increasing token ids below {config.vocab_size}")
    if faults:
        raise ValueError(f"{where} is not a whole ReDrafter of its config.json: {'; '.join(sorted(faults))}")


def read_config(folder: Path) -> dict[str, Any]:
    """A checkpoint's config.json.

    Raises:
        ValueError: no such folder, no or broken config.json, or a drafter of another family.
    """
    path = folder / CONFIG
    if not path.is_file():
        raise ValueError(f"{folder} holds no {CONFIG}; give the folder of a trained drafter")
    try:
        config: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from error
    if config.get("model_type") != ReDrafterConfig.model_type:
        raise ValueError(
            f"{path}: model_type is {config.get('model_type')!r}, only {ReDrafterConfig.model_type!r} can be exported; "
            "give a ReDrafter's folder"
        )
    return config


def is_apple(config: Mapping[str, Any]) -> bool:
    """Whether a config is Apple's: it says nothing of the target that ours is bound to."""
    return "target_fingerprint" not in config


def read_tensors(folder: Path) -> dict[str, Tensor]:
    """The tensors of ``model.safetensors``. Pickled checkpoints are never opened: reading one can run code.

    Raises:
        ValueError: there is no safetensors file, or it is broken.
    """
    path = folder / WEIGHTS
    if not path.is_file():
        pickles = sorted(found.name for pattern in _PICKLES for found in folder.glob(pattern))
        if pickles:
            raise ValueError(
                f"{folder} holds {', '.join(pickles)} but no {WEIGHTS}; pickled weights can run code and are not read. "
                'Convert them: python -c "import torch, safetensors.torch as s; '
                f"s.save_file(torch.load('{pickles[0]}', weights_only=True), '{WEIGHTS}')\""
            )
        raise ValueError(f"{folder} holds no {WEIGHTS}; give the folder of a trained drafter")
    try:
        return load_file(path)
    except SafetensorError as error:
        raise ValueError(f"{path} is cut off or no safetensors file: {error}; export it again") from error


def load(folder: Path) -> ReDrafter:
    """A drafter from our layout, checked against the table; dtype as stored, attached to no target yet.

    Raises:
        ValueError: the folder is not a whole ReDrafter in our layout.
    """
    fields = read_config(folder)
    if is_apple(fields):
        raise ValueError(
            f"{folder} is in Apple's layout, which names no target; read it with load_apple and its target"
        )
    return _build(ReDrafterConfig.from_dict(fields), read_tensors(folder), str(folder))


def load_apple(folder: Path, ends: TargetEnds, tokenizer_fingerprint: str = "") -> ReDrafter:
    """A drafter from Apple's layout, bound and attached to the target that the user names.

    Raises:
        ValueError: keys of the config are missing, sizes are not the target's, or the tensors are not the table's.
    """
    fields = read_config(folder)
    missing = [key for key in APPLE_KEYS if key not in fields and key != "num_lookback_tokens"]
    if missing:
        raise ValueError(f"{folder / CONFIG} lacks {', '.join(missing)}, which Apple's layout has; add them by hand")
    config = _from_apple(
        fields,
        target_name=ends.name,
        target_fingerprint=ends.fingerprint,
        tokenizer_fingerprint=tokenizer_fingerprint,
    )
    drafter = _build(config, read_tensors(folder), str(folder))
    drafter.attach(ends)
    return drafter


def _build(config: ReDrafterConfig, tensors: Mapping[str, Tensor], where: str) -> ReDrafter:
    check_tensors(tensors, config, where)
    drafter = _fresh(config, tensors[f"lm_head.{config.num_draft_layers}.weight"].dtype)
    drafter.load_state_dict(dict(tensors), strict=True)
    return drafter.eval()


def _fresh(config: ReDrafterConfig, dtype: torch.dtype) -> ReDrafter:
    drafter = ReDrafter(config)
    for parameter in drafter.parameters():
        parameter.data = parameter.data.to(dtype)
    return drafter


def write(drafter: ReDrafter, folder: Path) -> None:
    """Write our layout into an existing folder, read it back, and compare every byte of every tensor and the logits.

    Raises:
        ValueError: the drafter does not fit its own table (NaN after a diverged training, for one).
    """
    drafter.config.architectures = [type(drafter).__name__]
    drafter.config.dtype = str(drafter.dtype).removeprefix("torch.")
    _write(drafter, folder, drafter.config.to_json_string())
    _same(drafter, load(folder), folder)


def write_apple(drafter: ReDrafter, folder: Path) -> None:
    """Write Apple's layout into an existing folder and read it back as :func:`write` does.

    Raises:
        ValueError: the drafter has a draft vocabulary. Apple's head scores the whole vocabulary without a bias, so
            there is
            no row that would keep a token out: zero rows would score 0, not minus infinity.
    """
    config = drafter.config
    if drafter.d2t is not None:
        raise ValueError(
            f"this drafter has a draft vocabulary of {config.draft_vocab_size} of {config.vocab_size} tokens, which "
            "Apple's layout cannot express; export it with --layout draftsmith, or train it with draft_vocab_size null"
        )
    fields = {key: getattr(config, key) for key in APPLE_KEYS if key != "num_lookback_tokens"}
    fields |= {"model_type": config.model_type, "num_lookback_tokens": 1}
    _write(drafter, folder, json.dumps(fields, indent=2) + "\n")
    _same(drafter, _build(_from_apple(read_config(folder)), read_tensors(folder), str(folder)), folder)


def _from_apple(fields: Mapping[str, Any], **bond: str) -> ReDrafterConfig:
    """Our config from Apple's fields; `num_lookback_tokens` says nothing of the head itself."""
    return ReDrafterConfig(
        exit_dim=int(fields["exit_dim"]),
        num_draft_layers=int(fields["num_draft_layers"]),
        rnn=bool(fields["rnn"]),
        hidden_size=int(fields["hidden_size"]),
        vocab_size=int(fields["vocab_size"]),
        **bond,
    )


def _write(drafter: ReDrafter, folder: Path, config_text: str) -> None:
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in drafter.state_dict().items()}
    check_tensors(tensors, drafter.config, "the drafter in memory")
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    (folder / CONFIG).write_text(config_text, encoding="utf-8")


def _same(drafter: ReDrafter, reread: ReDrafter, folder: Path) -> None:
    before, after = drafter.state_dict(), reread.state_dict()
    changed = [name for name in before if not torch.equal(before[name].cpu(), after[name])]
    if changed or not torch.equal(probe_logits(drafter), probe_logits(reread)):
        raise ValueError(
            f"{folder}: read back, {', '.join(changed) or 'the logits'} differ from what was written; check the disk"
        )


class _ProbeEnds:
    """Stands in for a target of any size: fixed waves as embeddings, no norm. Enough to compare two drafters."""

    def __init__(self, config: ReDrafterConfig) -> None:
        self.name, self.fingerprint = config.target_name, config.target_fingerprint
        self.hidden_size, self.vocab_size = config.hidden_size, config.vocab_size

    def embed(self, ids: Tensor) -> Tensor:
        """int64 [...] -> float32 [..., D]."""
        return torch.sin((ids[..., None] + 1) * torch.arange(1, self.hidden_size + 1) / self.hidden_size)

    def final_norm(self, hidden: Tensor) -> Tensor:
        """[..., D], unchanged."""
        return hidden


@torch.no_grad()
def probe_logits(drafter: ReDrafter, num_anchors: int = 8) -> Tensor:
    """Logits [K, A, Vd] over a fixed random rollout, without the target: equal bit for bit for equal drafters."""
    config = drafter.config
    generator = torch.Generator().manual_seed(0)
    tokens_AK = torch.randint(config.vocab_size, (num_anchors, config.num_draft_steps), generator=generator)
    anchors_A = torch.arange(num_anchors)
    mask_A = torch.ones(num_anchors, dtype=torch.bool)
    hidden_AD = torch.randn(num_anchors, config.hidden_size, generator=generator)
    batch = PackedBatch(tokens_AK[:, 0], mask_A, torch.zeros_like(anchors_A), anchors_A, {PRE_NORM: hidden_AD})
    probe = _fresh(config, drafter.dtype)
    probe.load_state_dict({name: tensor.cpu() for name, tensor in drafter.state_dict().items()})
    probe.attach(cast(TargetEnds, _ProbeEnds(config)))
    return (
        probe.teacher_forced(batch, Rollout(anchors_A, tokens_AK, tokens_AK, mask_A[:, None].expand_as(tokens_AK)))
        @ probe.head_weight.T
    )
