"""LoRA adapters of a drafter, kept beside it or merged into it.

Owns the bond of an adapter to the drafter below it and to a target. Owns also how LoRA enters families that read some weights without
calling the layer. Knows no training, no decoding, no single family, and no adapter of a target (`models/files/merged_adapter.py`).

Its folder is in PEFT's own layout (`models/files/adapter_files.py`), with a ``bond.json`` beside it.

Shape legend: O output features, I input features.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora import Linear as LoraLinear
from safetensors.torch import save_file
from torch import Tensor, nn

from draftsmith.models.drafters.drafter import Drafter
from draftsmith.models.drafters.drafter_config import DrafterConfig
from draftsmith.models.files.adapter_files import BOND, CONFIG, PREFIX, WEIGHTS, read_json, read_weights
from draftsmith.models.files.field_rules import COUNT, NAMES, POSITIVE, TEXT, Rule, check_fields, is_number
from draftsmith.models.files.pretrained import name_faults

_REMEDY = "train the adapter again"
_BOND_RULES: dict[str, Rule] = {
    **{name: DrafterConfig.rules[name] for name in ("target_name", "target_fingerprint", "tokenizer_fingerprint")},
    **{name: DrafterConfig.rules[name] for name in ("num_draft_steps", "score_scale")},
    "drafter": TEXT,
    "drafter_fingerprint": TEXT,
}
_LORA_RULES: dict[str, Rule] = {
    "r": COUNT,
    "lora_alpha": POSITIVE,
    "lora_dropout": (lambda value: is_number(value) and 0 <= value < 1, "a number of at least 0 and below 1"),
    "target_modules": (lambda value: NAMES[0](value) and bool(value), "a list of names of layers, each once"),
}


@dataclass(frozen=True)
class LoraSettings:
    """Low-rank adaptation of a drafter (arXiv:2106.09685): W + alpha / rank * B A, B starting at zero.

    Attributes:
        rank: of A and B.
        alpha: see above.
        dropout: on what goes into A; layers whose weights a family reads without calling them have none.
        target_modules: names of linear layers, or the ends of names (``q_proj``); null takes every one that is not frozen.

    Raises:
        ValueError: a rank below 1, an alpha not above 0, a dropout outside [0, 1), or an empty list of names.
    """

    rank: int = 8
    alpha: float = 16.0
    dropout: float = 0.0
    target_modules: list[str] | None = None

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise ValueError(f"lora rank is {self.rank}; it must be at least 1")
        if self.alpha <= 0.0:
            raise ValueError(f"lora alpha is {self.alpha}; it must be above 0")
        if not 0.0 <= self.dropout < 1.0:
            raise ValueError(f"lora dropout is {self.dropout}; it must be at least 0 and below 1")
        if self.target_modules is not None and not self.target_modules:
            raise ValueError("lora target_modules is empty; name linear layers, or give null for every one")


@dataclass(frozen=True)
class AdapterBond:
    """What a drafter's adapter belongs to.

    Attributes:
        drafter: where the drafter below it was.
        drafter_fingerprint: of that drafter's weights (``module_fingerprint``).
        target_name, target_fingerprint, tokenizer_fingerprint: the target that the adapted drafter is for.
        num_draft_steps: the horizon it was trained for.
        score_scale: how sharply its scores are read (see ``Drafter.score_scale``).
    """

    drafter: str
    drafter_fingerprint: str
    target_name: str
    target_fingerprint: str
    tokenizer_fingerprint: str
    num_draft_steps: int
    score_scale: float

    @classmethod
    def of(cls, drafter: Drafter, base: str, base_fingerprint: str) -> AdapterBond:
        """Make the bond of an adapted drafter in memory, from its config.

        Args:
            drafter: the adapted one.
            base: where the drafter below it was.
            base_fingerprint: of that drafter's weights.

        Returns:
            The bond.
        """
        config = drafter.config
        target = (config.target_name, config.target_fingerprint, config.tokenizer_fingerprint)
        return cls(base, base_fingerprint, *target, config.num_draft_steps, float(config.score_scale))

    def bind(self, drafter: Drafter) -> None:
        """Make the drafter's config say what this says.

        Args:
            drafter: the adapted one, changed in place.
        """
        for name, value in asdict(self).items():
            if not name.startswith("drafter"):
                setattr(drafter.config, name, value)


class AdaptedLinear(LoraLinear):
    """PEFT's LoRA layer, whose ``weight`` is the adapted one.

    Families read some weights without calling the layer: a head that the loss multiplies by, or halves of a projection. PEFT gives them the
    weight below the adapter, so that an adapter would act in one place and not in the other.

    Attributes:
        constant: the adapters will not change any more; the weight last read is then kept until another adapter is activated.
    """

    constant = False
    _kept: tuple[tuple[Any, ...], Tensor] | None = None

    @property
    def weight(self) -> Tensor:
        """[O, I]."""
        below = self._below
        names = [name for name in self.active_adapters if name in self.lora_A]
        if not names:
            return below
        if not self.constant or torch.is_grad_enabled():
            return self._adapted(below, names)
        key = (*names, below.device, below.dtype)
        if self._kept is None or self._kept[0] != key:
            self._kept = (key, self._adapted(below, names))
        return self._kept[1]

    @property
    def _below(self) -> Tensor:
        weight = self.get_base_layer().weight
        assert isinstance(weight, Tensor)
        return weight

    def activate(self, names: Sequence[str]) -> None:
        """Take these adapters, as far as this layer has them; nothing is trained.

        Args:
            names: of the adapters.
        """
        self.set_adapter(list(names))
        self.requires_grad_(False)
        self._kept = None

    def _adapted(self, below: Tensor, names: Sequence[str]) -> Tensor:
        weight = below
        for name in names:
            weight = weight + self.get_delta_weight(name)
        return weight.to(below.dtype)


def linear_layers(drafter: Drafter) -> list[str]:
    """List a drafter's linear layers, adapted or not.

    Args:
        drafter: of any family.

    Returns:
        Their names, sorted.
    """
    names = (name for name, module in drafter.named_modules() if isinstance(module, nn.Linear | AdaptedLinear))
    return sorted(name for name in names if ".base_layer" not in name and ".lora_" not in name)


def adapted_layers(drafter: Drafter) -> Iterator[tuple[str, AdaptedLinear]]:
    """Walk over the layers that have an adapter.

    Args:
        drafter: of any family.

    Yields:
        Name and layer.
    """
    for name, module in drafter.named_modules():
        if isinstance(module, AdaptedLinear):
            yield name, module


def add_adapter(drafter: Drafter, settings: LoraSettings, name: str) -> None:
    """Put a fresh adapter on a drafter, in place: it changes nothing yet, and it alone is trained from now on.

    Args:
        drafter: of any family with linear layers.
        settings: which layers, and how.
        name: what the adapter is called in memory.

    Raises:
        ValueError: no linear layer is of a name that was asked for, or all are frozen.
    """
    layers = linear_layers(drafter)
    chosen = [layer for layer in layers if drafter.get_submodule(layer).weight.requires_grad]
    for wanted in settings.target_modules or []:
        if not any(_is_called(layer, wanted) for layer in layers):
            raise ValueError(
                f"lora target_modules names {wanted!r}; the linear layers of this {type(drafter).__name__} are {', '.join(layers)}"
            )
    if settings.target_modules is not None:
        chosen = [layer for layer in layers if any(_is_called(layer, wanted) for wanted in settings.target_modules)]
    if not chosen:
        raise ValueError(
            f"this {type(drafter).__name__} has no linear layer that is trained; name some with target_modules"
        )
    _inject(drafter, settings.rank, settings.alpha, settings.dropout, chosen, name)


def save_adapter(drafter: Drafter, folder: Path, name: str, bond: AdapterBond) -> None:
    """Write one adapter of a drafter into an existing folder, as PEFT reads it, in float32, with its bond.

    Args:
        drafter: the adapted one.
        folder: where to.
        name: what the adapter is called in memory.
        bond: what it belongs to.

    Raises:
        ValueError: the drafter has no such adapter.
    """
    layers = [(path, layer) for path, layer in adapted_layers(drafter) if name in layer.lora_A]
    if not layers:
        raise ValueError(f"this {type(drafter).__name__} has no adapter {name!r}; add or load it first")
    _, first = layers[0]
    dropout = first.lora_dropout[name]
    fields = {
        "peft_type": "LORA",
        "task_type": None,
        "base_model_name_or_path": bond.drafter,
        "inference_mode": True,
        "r": first.r[name],
        "lora_alpha": first.lora_alpha[name],
        "lora_dropout": dropout.p if isinstance(dropout, nn.Dropout) else 0.0,
        "target_modules": [path for path, _ in layers],
        "bias": "none",
    }
    tensors = {key: tensor.detach().cpu().float().contiguous() for key, tensor in _tensors(drafter, name).items()}
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    (folder / CONFIG).write_text(json.dumps(fields, indent=2) + "\n", encoding="utf-8")
    (folder / BOND).write_text(json.dumps(asdict(bond), indent=2) + "\n", encoding="utf-8")


def is_drafter_adapter(folder: Path) -> bool:
    """Tell whether a folder holds an adapter of a drafter, not of a language model.

    Args:
        folder: any.

    Returns:
        True where ``bond.json`` lies in it.
    """
    return (folder / BOND).is_file()


def read_bond(folder: Path) -> AdapterBond:
    """Read what the adapter in a folder belongs to.

    Args:
        folder: that training wrote.

    Returns:
        The bond.

    Raises:
        ValueError: the folder holds no adapter of a drafter.
    """
    if not is_drafter_adapter(folder):
        raise ValueError(
            f"{folder} holds no adapter of a drafter ({BOND} is missing); give what training with `lora` wrote"
        )
    fields = read_json(folder / BOND)
    if fields.keys() != _BOND_RULES.keys():
        missing, unknown = sorted(_BOND_RULES.keys() - fields.keys()), sorted(fields.keys() - _BOND_RULES.keys())
        raise ValueError(
            f"{folder / BOND} is not a bond of this version: it lacks {missing} and has unknown {unknown!r:.200}; {_REMEDY}"
        )
    check_fields(fields, _BOND_RULES, str(folder / BOND), _REMEDY)
    return AdapterBond(**fields)


def load_adapter(drafter: Drafter, folder: Path, name: str, fingerprint: str) -> AdapterBond:
    """Put a trained adapter beside those that a drafter has, in place; :func:`activate` says which one acts.

    Args:
        drafter: the one it was trained on.
        folder: what training wrote.
        name: what it is called in memory.
        fingerprint: the drafter's own (``module_fingerprint``), taken before any adapter came to it.

    Returns:
        What the adapter belongs to.

    Raises:
        ValueError: no adapter of a drafter, one of another drafter, one of a kind that drafters do not have, or one that is not whole.
    """
    bond = read_bond(folder)
    if bond.drafter_fingerprint != fingerprint:
        raise ValueError(
            f"{folder} adapts the drafter {bond.drafter!r} (fingerprint {bond.drafter_fingerprint[:12]}), not this one "
            f"({fingerprint[:12]}); give that drafter, or train an adapter for this one"
        )
    config = _read_config(folder)
    saved = read_weights(folder)
    layers = linear_layers(drafter)
    unknown = sorted(set(config["target_modules"]) - set(layers))
    if unknown:
        raise ValueError(f"{folder} adapts {', '.join(unknown)}, which this {type(drafter).__name__} has not")
    _inject(drafter, config["r"], config["lora_alpha"], config["lora_dropout"], config["target_modules"], name)
    own = _tensors(drafter, name)
    faults = {
        "missing": sorted(own.keys() - saved.keys()),
        "unexpected": sorted(saved.keys() - own.keys()),
        "of another shape": sorted(key for key in own.keys() & saved.keys() if own[key].shape != saved[key].shape),
    }
    if any(faults.values()):
        raise ValueError(
            f"{folder / WEIGHTS} does not fit its {CONFIG} ({name_faults(faults)}); train the adapter again"
        )
    with torch.no_grad():
        for key, tensor in own.items():
            tensor.copy_(saved[key])
    for _, layer in adapted_layers(drafter):
        layer.constant = True
    activate(drafter, None)
    return bond


def activate(drafter: Drafter, name: str | None) -> None:
    """Let one adapter act, or none: the drafter as it was.

    Args:
        drafter: with adapters, changed in place.
        name: of the adapter; None for none.
    """
    for _, layer in adapted_layers(drafter):
        layer.activate([] if name is None else [name])


def merge_adapter(drafter: Drafter, name: str | None) -> Drafter:
    """Add one adapter's weights to the drafter's own, in place, and remove all adapters from it.

    Args:
        drafter: with adapters.
        name: of the adapter; None leaves the weights as they were.

    Returns:
        The same drafter.

    Raises:
        ValueError: the sum is not finite.
    """
    for path, layer in list(adapted_layers(drafter)):
        if name is not None and name in layer.lora_A:
            layer.merge(safe_merge=True, adapter_names=[name])
        parent, _, child = path.rpartition(".")
        setattr(drafter.get_submodule(parent), child, layer.get_base_layer())
    return drafter


def _is_called(layer: str, name: str) -> bool:
    return layer == name or layer.endswith(f".{name}")


def _inject(drafter: Drafter, rank: int, alpha: float, dropout: float, layers: list[str], name: str) -> None:
    """PEFT's injection with our layer; adapters are float32 whatever the drafter is."""
    # Full names, since PEFT would take "fc" for the end of any other name too.
    pattern = "|".join(layer.replace(".", r"\.") for layer in layers)
    config = LoraConfig(r=rank, lora_alpha=alpha, lora_dropout=dropout, target_modules=f"(?:{pattern})")  # type: ignore[arg-type]
    config._register_custom_module({nn.Linear: AdaptedLinear})
    inject_adapter_in_model(config, drafter, name)
    # PEFT would warn of the first adapter when it adds a second.
    del drafter.peft_config
    for _, layer in adapted_layers(drafter):
        layer.lora_A.float()
        layer.lora_B.float()
        layer.train(drafter.training)  # new modules begin in training, where dropout is at work


def _tensors(drafter: Drafter, name: str) -> dict[str, Tensor]:
    """An adapter's tensors by PEFT's names: ``base_model.model.<layer>.lora_A.weight`` [rank, I], ``.lora_B.weight`` [O, rank]."""
    tensors: dict[str, Tensor] = {}
    for path, layer in adapted_layers(drafter):
        for part, product in (("lora_A", layer.lora_A), ("lora_B", layer.lora_B)):
            if name in product:
                tensors[f"{PREFIX}{path}.{part}.weight"] = product.get_parameter(f"{name}.weight")
    return tensors


def _read_config(folder: Path) -> dict[str, Any]:
    """The fields that a drafter's adapter has.

    Raises:
        ValueError: fields are missing, or it is of another kind.
    """
    fields = read_json(folder / CONFIG)
    missing = [name for name in _LORA_RULES if name not in fields]
    if fields.get("peft_type") != "LORA" or missing:
        raise ValueError(
            f"{folder / CONFIG} is of the kind {fields.get('peft_type')!r} and lacks {', '.join(missing) or 'nothing'}; a drafter's "
            "adapter is a plain LORA"
        )
    check_fields(fields, _LORA_RULES, str(folder / CONFIG), _REMEDY)
    extra = (
        "use_dora",
        "use_rslora",
        "modules_to_save",
        "rank_pattern",
        "alpha_pattern",
        "target_parameters",
        "lora_bias",
    )
    asked = [name for name in extra if fields.get(name)]
    if asked:
        raise ValueError(f"{folder / CONFIG} asks for {', '.join(asked)}; a drafter's adapter is a plain LORA without")
    return fields
