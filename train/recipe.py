"""The option `--recipe`: settings of a run that follow from the size of its cache.

Settings in a user's own files and flags win. Those of the configurations that ship with draftsmith are defaults, which a recipe may change.

Owns: which settings are the user's, and what a run says and records of a recipe. Does not know: the rules (`recipe_rules.py`).
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from draftsmith.data.cache.reader import HiddenStateCache
from draftsmith.train.config_files import is_shipped
from draftsmith.train.given_settings import sources, within
from draftsmith.train.recipe_rules import PAGE, RECIPES, Choice, Corpus

KEY = "recipe"
RECORD = "recipe.json"
_CACHE = "data.init_args.cache"
_CLASSES = {"model": "DraftModule", "data": "CacheDataModule"}


@dataclass(frozen=True)
class Recipe:
    """A recipe as applied to one run.

    Attributes:
        name: of the recipe.
        corpus: what it chose by.
        chosen: its choices that count.
        yours: its choices that the user has made, each with the key that the user set.
        set: keys that the configuration sets to something, by whoever.
    """

    name: str
    corpus: Corpus
    chosen: tuple[Choice, ...]
    yours: tuple[tuple[Choice, str], ...]
    set: frozenset[str] = frozenset()

    def arguments(self) -> list[str]:
        """The choices as one more configuration, for the end of a command line."""
        settings: dict[str, Any] = {}
        for choice in self.chosen:
            settings |= {key: None for key in choice.clears if key in self.set}
            settings[choice.key] = choice.value
        return [f"--config={json.dumps(_nested(settings))}"] if settings else []

    def lines(self) -> list[str]:
        """What a run prints at its start."""
        size = f"{self.corpus.labelled_tokens:,} labelled tokens"
        if not self.chosen and not self.yours:
            return [
                f"recipe {self.name}: the cache has {size}, more than was measured; the configuration stays as it is"
            ]
        return [
            f"recipe {self.name}: the cache has {size} and {self.corpus.prompt_tokens:,} of prompts ({PAGE})",
            *(f"recipe {self.name}: {choice.key} is {choice.value}: {choice.why}" for choice in self.chosen),
            *(f"recipe {self.name}: {choice.key} is left to you: you set {key}" for choice, key in self.yours),
        ]

    def record(self) -> dict[str, Any]:
        """For the run's folder."""
        return {
            "recipe": self.name,
            "rules": PAGE,
            "corpus": vars(self.corpus),
            "chosen": [{"key": choice.key, "value": choice.value, "why": choice.why} for choice in self.chosen],
            "yours": [{"key": choice.key, "set": key} for choice, key in self.yours],
        }


def applied(arguments: Sequence[str]) -> Recipe | None:
    """The recipe that the arguments or their files name; None where they name none.

    Args:
        arguments: of the command, with the base of each file before it.

    Raises:
        ValueError: a recipe that does not exist; a run that trains no draft head, or not from a cache; a cache that cannot be read.
    """
    given = [each for source in sources(arguments) for key in source for each in within(key)]
    latest = {_short(each.key): each.value for each in given}
    name = latest.get(KEY)
    if name in (None, "", "null"):
        return None
    if name not in RECIPES:
        raise ValueError(
            f"recipe is {name!r}; known recipes: {', '.join(RECIPES)}; leave it out to keep the configuration"
        )
    corpus = _corpus(str(name), latest)
    own = {_short(each.key): each.key for each in given if not each.file or not is_shipped(Path(each.file))}
    chosen: list[Choice] = []
    yours: list[tuple[Choice, str]] = []
    for choice in RECIPES[name](corpus):
        theirs = next((own[_short(key)] for key in (choice.key, *choice.rivals) if _short(key) in own), None)
        if theirs is None:
            chosen.append(choice)
        else:
            yours.append((choice, theirs))
    is_set = frozenset(each.key for each in given if latest[_short(each.key)] is not None)
    return Recipe(str(name), corpus, tuple(chosen), tuple(yours), is_set)


def _nested(settings: dict[str, Any]) -> dict[str, Any]:
    """Example: `{"a.b": 1}` -> `{"a": {"b": 1}}`."""
    content: dict[str, Any] = {}
    for key, value in settings.items():
        *outer, leaf = key.split(".")
        place = content
        for name in outer:
            place = place.setdefault(name, {})
        place[leaf] = value
    return content


def _short(key: str) -> str:
    """A key without `init_args`, which flags may leave out."""
    return key.replace("+", "").replace(".init_args", "")


def _corpus(name: str, latest: dict[str, Any]) -> Corpus:
    """Reads the size of the cache.

    Args:
        name: of the recipe.
        latest: the value of each key that counts, by its short name.
    """
    for part, known in _CLASSES.items():
        own = str(latest.get(f"{part}.class_path") or latest.get(part) or "").rpartition(".")[2]
        if own != known:
            raise ValueError(
                f"recipe {name!r} is for runs whose {part} is {known}, and here it is {own or 'not named'}; leave the recipe out"
            )
    place = latest.get(_short(_CACHE))
    if not isinstance(place, str) or not place:
        raise ValueError(f"recipe {name!r} chooses by the size of a cache; give {_CACHE}, or leave the recipe out")
    cache = HiddenStateCache(place, check="off")
    manifest = cache.manifest
    cache.close()
    starts_from = latest.get("model.init_from")
    return Corpus(
        manifest.num_labelled,
        manifest.num_tokens - manifest.num_labelled,
        "" if starts_from in (None, "null") else str(starts_from),
    )
