"""The one strict reader of trained drafters: whatever decodes, evaluates, trains on, checks or exports a drafter gets it from here.

Owns the checks of a drafter's config and tensors, and how the module is put together from them. Loaders elsewhere are lax: a
tensor that is missing may become random numbers, and a NaN decodes at one token a step in silence. What a family's tensors must be
follows from its module. Knows no family, and runs nothing that lies in a drafter's folder.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import reduce
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, cast

import torch
from torch import Tensor

from draftsmith.models.files.checkpoint_files import CONFIG, read_fields, read_tensors
from draftsmith.models.files.field_rules import check_fields
from draftsmith.models.files.pretrained import RAISED_BY_CONFIGS
from draftsmith.models.files.tables import Table, TensorSpec
from draftsmith.models.other_software.unread_fields import warn_of_unread

if TYPE_CHECKING:
    from draftsmith.models.drafters.drafter import Drafter
    from draftsmith.models.drafters.drafter_config import DrafterConfig

_Family = TypeVar("_Family", bound="Drafter")
_REMEDY = "export the drafter again"


def read_drafter(folder: Path, kind: type[_Family], finite: bool = True) -> _Family:
    """Read a drafter of one family from its folder.

    Args:
        folder: with ``config.json`` and ``model.safetensors``.
        kind: the family.
        finite: False lets NaN and infinity pass, for who looks for them.

    Returns:
        The drafter in evaluation mode, attached to nothing; dtype as stored.

    Raises:
        ValueError: a file is missing or broken, a field of the config breaks its rule, or the tensors are not those of the family. That
            covers name, shape and dtype, all values finite, and a draft vocabulary of increasing token ids.
    """
    drafter = build_drafter(kind, read_fields(folder), read_tensors(folder), str(folder), finite)
    drafter.loaded_from = folder
    return drafter


def build_drafter(
    kind: type[_Family], fields: Mapping[str, Any], tensors: Mapping[str, Tensor], place: str, finite: bool = True
) -> _Family:
    """As :func:`read_drafter`, of what a folder holds.

    Args:
        kind: the family.
        fields: of ``config.json``.
        tensors: by name.
        place: what errors call the folder.
        finite: False lets NaN and infinity pass, for who looks for them.

    Returns:
        The drafter in evaluation mode, attached to nothing.

    Raises:
        ValueError: as :func:`read_drafter`.
    """
    config = drafter_config(kind, fields, place)
    module_table(kind, config, place).check(tensors, place, finite)
    return assemble(kind, config, tensors)


def drafter_config(kind: type[_Family], fields: Mapping[str, Any], place: str) -> DrafterConfig:
    """Make the family's config from the fields of a ``config.json``; fields that mean nothing to the family are named in a warning.

    Args:
        kind: the family.
        fields: by name.
        place: what errors call the folder.

    Returns:
        The config.

    Raises:
        ValueError: naming the field, its value and its rule.
    """
    rules = kind.config_class.rules
    check_fields(fields, rules, f"{place}: {CONFIG}", _REMEDY, required=("hidden_size", "vocab_size"))
    config = kind.config_class(**{name: fields[name] for name in rules if name in fields})
    config.check(f"{place}: {CONFIG}", _REMEDY)
    warn_of_unread(fields, rules, place)
    return config


def module_table(kind: type[Drafter], config: DrafterConfig, place: str = "the config") -> Table:
    """List every tensor of a family's checkpoint: those of its module, which is made without memory for it.

    Args:
        kind: the family.
        config: with the sizes.
        place: what errors call the folder.

    Returns:
        Names, shapes and dtypes.

    Raises:
        ValueError: no module can be made of the config.
    """
    try:
        with torch.device("meta"):
            module = kind(config)
    except RAISED_BY_CONFIGS as error:
        raise ValueError(f"{place}: no {kind.__name__} can be made of its {CONFIG} ({error}); {_REMEDY}") from error
    specs = {name: TensorSpec.of(tensor) for name, tensor in module.state_dict().items()}
    return Table(kind.__name__, config.vocab_size, specs)


def assemble(kind: type[_Family], config: DrafterConfig, tensors: Mapping[str, Tensor]) -> _Family:
    """Make a drafter of given tensors. Of several dtypes it takes the one that holds all.

    Parameters are changed one by one: to move the whole module to another dtype would round its rotary angles too. Torch's random
    numbers are left as they were, though a fresh module draws some.

    Args:
        kind: the family.
        config: with the sizes.
        tensors: by name, all of the module's.

    Returns:
        The drafter in evaluation mode, attached to nothing.
    """
    with torch.random.fork_rng(devices=[]):
        drafter = kind(config)
    dtype = reduce(torch.promote_types, (tensor.dtype for tensor in tensors.values() if tensor.is_floating_point()))
    for parameter in drafter.parameters():
        parameter.data = parameter.data.to(dtype)
    drafter.load_state_dict(dict(tensors), strict=True)
    return cast(_Family, drafter.eval())
