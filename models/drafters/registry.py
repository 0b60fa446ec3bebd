"""Every drafter family that this machine has: those of the package, and those of other installed packages.

Owns how families are found: the package's own by looking into `models/families/` and its rooms, others by the entry point group
``draftsmith.families``. Knows no family by name. Packages are imported when a family is looked for that is not the package's own.

A ``custom_generate`` folder has another module in place of this one: it knows the one family of its drafter, and offers
`drafter_class` alone.
"""

from __future__ import annotations

import importlib
import pkgutil
import warnings
from functools import cache
from importlib.metadata import EntryPoint, entry_points

from transformers import AutoConfig, AutoModel

from draftsmith.models.drafters.drafter import Drafter
from draftsmith.models.drafters.family import DrafterFamily, Family
from draftsmith.models.tree.limits import DraftLimits

GROUP = "draftsmith.families"
_HOME = "draftsmith.models.families"


class Registry:
    """The families known so far.

    Attributes:
        faults: entry points that gave no family, each with the reason.
    """

    def __init__(self) -> None:
        self._by_model_type: dict[str, Family] = {}
        self._distributions: dict[str, str] = {}  # by model type, of the families of other packages
        self._plugins_read = False
        self.faults: list[str] = []

    def add(self, family: Family) -> None:
        """Make a family known here, and to Transformers' ``AutoConfig`` and ``AutoModel``. Adding it again changes nothing.

        Args:
            family: its record.

        Raises:
            ValueError: another family, or a model of Transformers, has its name or its model type.
        """
        model_type = family.config.model_type
        if self._by_model_type.get(model_type) == family:
            return
        for known in self._by_model_type.values():
            if family.name == known.name or model_type == known.config.model_type:
                raise ValueError(
                    f"family {family.name!r} with model_type {model_type!r} would take the place of {known.name!r} with model_type "
                    f"{known.config.model_type!r}; choose another name and model_type"
                )
        AutoConfig.register(model_type, family.config)
        AutoModel.register(family.config, family.drafter)
        self._by_model_type[model_type] = family

    def get(self, model_type: str) -> Family | None:
        """Look up a family. Other packages are imported only where the package's own have no such family.

        Args:
            model_type: of a config.

        Returns:
            The family, or None.
        """
        if model_type not in self._by_model_type:
            self.read_plugins()
        return self._by_model_type.get(model_type)

    def all(self) -> tuple[Family, ...]:
        """Give every family, the package's own first. Imports those of other packages.

        Returns:
            Their records.
        """
        self.read_plugins()
        return tuple(self._by_model_type.values())

    def distribution(self, model_type: str) -> str:
        """The installed distribution whose entry point names a family; empty for the package's own and for those added by hand."""
        self.read_plugins()
        return self._distributions.get(model_type, "")

    def read_plugins(self) -> None:
        """Import the families of other packages, once. One that fails is left out with a warning that names its distribution."""
        if self._plugins_read:
            return
        self._plugins_read = True  # before the imports, which may come here again
        for point in entry_points(group=GROUP):
            if fault := self._add_plugin(point):
                self.faults.append(fault)
                warnings.warn(fault, stacklevel=2)

    def _add_plugin(self, point: EntryPoint) -> str:
        """What is wrong with an entry point; empty where nothing is."""
        owner = "an unknown distribution" if point.dist is None else f"{point.dist.name} {point.dist.version}"
        place = f"the drafter family {point.name!r} of {owner} ({point.value}) is left out"
        try:
            loaded = point.load()
            if not isinstance(loaded, Family):
                return f"{place}: it is a {type(loaded).__name__}, not a Family; name the Family record in its pyproject.toml"
            self.add(loaded)
            if point.dist is not None:
                self._distributions[loaded.config.model_type] = point.dist.name
        except Exception as error:  # noqa: BLE001 - other people's code, of which commands for other families know nothing
            return f"{place}: {type(error).__name__}: {error}; repair or uninstall it"
        return ""


@cache
def registry() -> Registry:
    """Make the one registry of this process, with the package's own families.

    Returns:
        The registry; the same one at every call.
    """
    known = Registry()
    home = importlib.import_module(_HOME)
    for module in pkgutil.walk_packages(home.__path__, f"{_HOME}."):
        family = getattr(importlib.import_module(module.name), "FAMILY", None)
        if isinstance(family, Family):
            known.add(family)
    return known


def all_families() -> tuple[Family, ...]:
    """Give every family, those of other installed packages last.

    Returns:
        Their records.
    """
    return registry().all()


def register(family: Family) -> None:
    """Make a family known in this process: for notebooks and tests. An installed package is found by its entry point.

    Args:
        family: its record.

    Raises:
        ValueError: another family has its name or its model type.
    """
    registry().add(family)


def family_of(drafter: Drafter) -> Family:
    """Look up the family of a drafter in memory.

    Args:
        drafter: any.

    Returns:
        Its record.

    Raises:
        ValueError: it is of no known family.
    """
    family = registry().get(drafter.config.model_type)
    if family is None or type(drafter) is not family.drafter:
        known = ", ".join(known_family.about.title for known_family in all_families())
        raise ValueError(f"a {type(drafter).__name__} is of no known family ({known}){missing_families()}")
    return family


def drafter_class(model_type: str) -> type[Drafter]:
    """Look up the class of a family's drafters.

    Args:
        model_type: of a drafter's config.

    Returns:
        The class.

    Raises:
        ValueError: no family has this type.
    """
    family = registry().get(model_type)
    if family is None:
        raise ValueError(f"no drafter family has the model_type {model_type!r:.80}{missing_families()}")
    return family.drafter


def recorded_settings(settings: DrafterFamily) -> dict[str, object]:
    """The settings of a run's family for provenance, with the ``name`` of its record as ``family``."""
    names = (family.name for family in all_families() if family.settings is type(settings))
    return {"family": next(names, settings.kind.__name__.lower()), **settings.settings()}


def default_limits(drafter: Drafter, otherwise: DraftLimits) -> DraftLimits:
    """How a drafter drafts where nobody says: as its family's record has it, or ``otherwise``.

    Neither is deeper than the drafter can draft. If the record's shape must be cut for that, a warning says so.

    Args:
        drafter: of any family.
        otherwise: where the record says nothing.

    Returns:
        The limits.
    """
    family, most = registry().get(drafter.config.model_type), drafter.max_draft_steps
    own = None if family is None else family.limits
    limits = otherwise if own is None else own
    if most is None or limits.draft_length <= most:
        return limits
    if family is not None and own is not None:
        warnings.warn(
            f"the shape of draft of the family {family.name} is {own.draft_length} tokens deep, this drafter has heads for {most}: "
            f"drafts are cut to a depth of {most}; train with num_steps {own.draft_length} for the whole shape",
            stacklevel=2,
        )
    return limits.no_deeper_than(most)


def missing_families() -> str:
    """For errors about unknown families: which installed ones could not be read, and how a family becomes known.

    Returns:
        The end of a message, from its semicolon on.
    """
    faults = "".join(f"; {fault}" for fault in registry().faults)
    return f"; install the package of its family, which names it in the entry point group {GROUP}{faults}"
