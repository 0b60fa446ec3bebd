"""Tables of tensors: what a checkpoint must hold, by name, shape and dtype, and the check against that.

Owns the check. Loaders elsewhere are lax (a missing tensor may load in silence), so nothing is trusted because "it loads". Knows no
family and no file.

Shape legend: V target vocabulary, Vd draft vocabulary.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from draftsmith.models.files.finite import is_finite

_DTYPES = {
    "float": (torch.float32, torch.bfloat16, torch.float16),
    "int64": (torch.int64,),
    "bool": (torch.bool,),
}


@dataclass(frozen=True)
class TensorSpec:
    """What a tensor in a file must be.

    Attributes:
        shape: of the tensor.
        kind: of its dtype; ``float`` is float32, bfloat16 or float16.
        optional: whether it may be absent.
    """

    shape: tuple[int, ...]
    kind: Literal["float", "int64", "bool"] = "float"
    optional: bool = False

    @classmethod
    def of(cls, tensor: Tensor) -> TensorSpec:
        """What a tensor of a module asks of the one that is loaded into it.

        Args:
            tensor: the module's.

        Returns:
            Its shape and kind of dtype.
        """
        kinds: dict[torch.dtype, Literal["int64", "bool"]] = {torch.int64: "int64", torch.bool: "bool"}
        return cls(tuple(tensor.shape), kinds.get(tensor.dtype, "float"))

    def fits(self, tensor: Tensor) -> bool:
        """Whether shape and dtype are as they must be.

        Args:
            tensor: from a file.

        Returns:
            True where both are.
        """
        return tuple(tensor.shape) == self.shape and tensor.dtype in _DTYPES[self.kind]

    def __str__(self) -> str:
        return f"{self.kind} {list(self.shape)}"


@dataclass(frozen=True)
class Table:
    """Every tensor of one checkpoint by name, no more and no less.

    Attributes:
        what: the family's name, for messages.
        vocab_size: V; tensors named ``d2t`` and ``t2d`` must map into it.
        specs: by name.
    """

    what: str
    vocab_size: int
    specs: Mapping[str, TensorSpec]

    def renamed(self, names: Mapping[str, str], present: Collection[str] = ()) -> Table:
        """Make the table of a layout with other names.

        Args:
            names: the layout's name of a tensor -> the name here; several may be copies of one, of which one is enough.
            present: the layout's names of what a folder holds.

        Returns:
            The table, under the layout's names.
        """
        held = {names[name] for name in present if name in names}
        specs = {
            theirs: replace(self.specs[ours], optional=self.specs[ours].optional or ours in held)
            for theirs, ours in names.items()
        }
        return replace(self, specs=specs)

    def check(self, tensors: Mapping[str, Tensor], where: str, finite: bool = True) -> None:
        """Check tensors against the table: names, shapes and dtypes, finite values, and a draft vocabulary of increasing ids of the target.

        Args:
            tensors: by name.
            where: what errors call them.
            finite: False lets NaN and infinity pass, for who looks for them.

        Raises:
            ValueError: naming every tensor that is missing, unknown, misshapen or not finite, and a wrong map.
        """
        faults = [
            f"{name} is missing ({spec})"
            for name, spec in self.specs.items()
            if name not in tensors and not spec.optional
        ]
        faults += [f"{name} is unknown" for name in tensors if name not in self.specs]
        for name in self.specs.keys() & tensors.keys():
            spec, tensor = self.specs[name], tensors[name]
            if not spec.fits(tensor):
                kind = str(tensor.dtype).removeprefix("torch.")
                faults.append(f"{name} is {kind} {list(tensor.shape)}, not {spec}")
            elif finite and spec.kind == "float" and not is_finite(tensor):
                faults.append(f"{name} holds NaN or infinity")
        if not faults:
            faults += vocabulary_faults(tensors, self.vocab_size)
        if faults:
            raise ValueError(
                f"{where} is not a whole {self.what} of its config.json: {'; '.join(sorted(faults))}; take config.json and weights of one "
                "export, and copy them again"
            )


def vocabulary_faults(tensors: Mapping[str, Tensor], vocab_size: int) -> list[str]:
    """Find what is wrong with ``d2t`` and ``t2d``, where they are there.

    Args:
        tensors: by name; ``d2t`` int64 [Vd], target id = i + d2t[i], and ``t2d`` bool [V], True at target ids that are drafted.
        vocab_size: V.

    Returns:
        The fault in words, alone in a list; empty where there is none.
    """
    if "d2t" not in tensors:
        return []
    if fault := _map_fault(tensors["d2t"], torch.int64):
        return [f"d2t {fault}"]
    ids = target_ids(tensors["d2t"])
    # Not only the first and the last: steps between numbers of 64 bits overflow, and would then look like forward ones.
    if bool((ids < 0).any()) or bool((ids >= vocab_size).any()) or bool((ids.diff() <= 0).any()):
        return [f"d2t does not map to increasing token ids below {vocab_size}"]
    if "t2d" not in tensors:
        return []
    if fault := _map_fault(tensors["t2d"], torch.bool):
        return [f"t2d {fault}"]
    if len(tensors["t2d"]) != vocab_size or not torch.equal(tensors["t2d"], membership(ids, vocab_size)):
        return ["t2d does not mark the token ids that d2t maps to"]
    return []


def num_drafted(tensors: Mapping[str, Tensor], where: str, name: str = "d2t") -> int | None:
    """Count the tokens of a draft vocabulary by its map.

    Args:
        tensors: by name.
        where: what errors call them.
        name: of the map.

    Returns:
        Vd; None where there is no map.

    Raises:
        ValueError: the map is no list of whole numbers, or an empty one.
    """
    if name not in tensors:
        return None
    if fault := _map_fault(tensors[name], torch.int64, torch.int32):
        raise ValueError(f"{where}: {name} {fault}; copy the weights again, or export the drafter again")
    return len(tensors[name])


def regular_maps(tensors: Mapping[str, Tensor], vocab_size: object) -> dict[str, Tensor]:
    """Give the maps of a draft vocabulary the form that they have here: other software also writes them where no token is left out.

    Args:
        tensors: by name; ``d2t`` int32 or int64 [Vd] and ``t2d`` bool [V], where they are there.
        vocab_size: V.

    Returns:
        The tensors with an int64 ``d2t``; without both maps where ``d2t`` maps each of V tokens to itself and ``t2d`` marks all.
    """
    regular = dict(tensors)
    d2t, t2d = tensors.get("d2t"), tensors.get("t2d")
    if d2t is None or d2t.dtype not in (torch.int64, torch.int32) or d2t.ndim != 1:
        return regular
    regular["d2t"] = d2t.to(torch.int64)
    is_whole = len(d2t) == vocab_size and not bool(d2t.any())
    if is_whole and (t2d is None or (t2d.dtype == torch.bool and t2d.shape == d2t.shape and bool(t2d.all()))):
        regular.pop("d2t")
        regular.pop("t2d", None)
    return regular


def _map_fault(given: Tensor, *dtypes: torch.dtype) -> str:
    """What is wrong with dtype or shape of a map between two vocabularies; empty where nothing is."""
    if given.dtype in dtypes and given.ndim == 1 and len(given):
        return ""
    kind, wanted = (str(dtype).removeprefix("torch.") for dtype in (given.dtype, dtypes[0]))
    return f"is {kind} {list(given.shape)}, it must be {wanted} with one number for each token"


def target_ids(d2t: Tensor) -> Tensor:
    """Turn the offsets of a draft vocabulary into target ids: ``[0, 2, 2]`` means ``[0, 3, 4]``.

    Args:
        d2t: int64 [Vd].

    Returns:
        int64 [Vd].
    """
    return d2t + torch.arange(len(d2t))


def membership(ids: Tensor, vocab_size: int) -> Tensor:
    """Mark target ids.

    Args:
        ids: int64 [Vd].
        vocab_size: V.

    Returns:
        bool [V], True at them.
    """
    inside = torch.zeros(vocab_size, dtype=torch.bool)
    inside[ids] = True
    return inside
