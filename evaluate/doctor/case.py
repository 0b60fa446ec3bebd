"""What every check of `draftsmith doctor` looks at: one drafter, its target, and a few samples of what it was trained on.

Owns how one folder leads to drafter, training record, target, cache and replies, and the error where one is missing. Does not know the
checks.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from draftsmith import provenance
from draftsmith.data.cache.features import prompt_lengths
from draftsmith.data.cache.reader import HiddenStateCache
from draftsmith.data.corpus import RESPONSE_GLOB
from draftsmith.data.shards.shards import CachedSample
from draftsmith.evaluate.records import Sample
from draftsmith.json_text import parse_json_object
from draftsmith.models.drafters.draft_lm import LMDrafter
from draftsmith.models.drafters.drafter import Drafter
from draftsmith.models.drafters.drafter_folder import COMPOSED, drafter_folder, load_drafter
from draftsmith.models.drafters.other_layouts import TargetBond
from draftsmith.models.files.adapter_files import BOND
from draftsmith.models.other_software.speculators_config import verifier_name
from draftsmith.models.target.ends import TargetEnds
from draftsmith.models.target.prompt_template import NO_OPTIONS, TemplateOptions
from draftsmith.models.target.target import PRE_NORM, Target, TargetOutput

MAX_TOKENS = 2048
"""Longer samples are cut to their first so many tokens before anything is computed on them."""
_FETCHED = 4  # shards of a remote cache that samples are drawn from


class NotChecked(Exception):
    """A check that cannot be made; its text says why, and what would be needed."""


@dataclass(frozen=True)
class CaseInputs:
    """Where things are, as far as one folder and its provenance tell; options of the command go before.

    Attributes:
        folder: of the drafter.
        origin: the folder it was exported from, where that is still there and holds the same weights (without an adapter).
        exported: whether `draftsmith export` wrote the folder.
        record: settings of its training; empty where nobody wrote them down.
        target, revision, adapter: what the target was loaded by.
        cache: folder or URL of the hidden-state cache that it was trained from, or None.
        lost_cache: the cache that the record names and that is not there, or None.
    """

    folder: Path
    origin: Path | None
    record: Mapping[str, Any]
    target: str
    revision: str | None
    adapter: str | None
    cache: str | None
    lost_cache: str | None = None
    exported: bool = False

    @property
    def no_cache(self) -> str:
        """Why there is no cache, and what to do."""
        if self.lost_cache is not None:
            return f"{self.lost_cache}, which the provenance names, is not there: name the cache with --cache"
        return "no cache is known: name it with --cache (of an online run: extract one from its replies first)"


@dataclass(frozen=True)
class Use:
    """How the drafter is used, as far as it is known.

    Args:
        draft_length: Tokens that you draft in a cycle, to be compared with what was trained.
        temperature: What you decode at, to be compared with the replies'.
        judge: A checker, as in `draftsmith label generate`: also tells whether a judge could keep the answers right with this draft LM.
    """

    draft_length: int | None = None
    temperature: float | None = None
    judge: str | None = None


UNKNOWN_USE = Use()


@dataclass(frozen=True)
class Projection:
    """The target's likeliest next token at every position of every sample.

    Attributes:
        cached: of the cached states, a sample int64 [T] each; None where the cache has no `last.pre_norm`.
        fresh: of a forward made now; None where the target's trunk was not loaded.
        labelled_next: bool [T], True where the next token is of the same sample and trained on.
        sharpness: mean probability of the likeliest token at those positions, at the replies' temperature (1 where unknown, and
            for greedy replies 1.0): how often text that the target drew itself would agree with its likeliest token.
    """

    cached: tuple[Tensor, ...] | None
    fresh: tuple[Tensor, ...] | None
    labelled_next: tuple[Tensor, ...]
    sharpness: float


@dataclass(frozen=True)
class Case:
    """Everything loaded once.

    Attributes:
        inputs: where it came from.
        drafter: as it is served, attached, in evaluation mode.
        trained: the drafter that `drafter` was exported from, or the same one.
        ends: the target's.
        target: the whole target, or None.
        tokenizer: the target's.
        cache: opened, or None.
        samples: some of its samples, cut to MAX_TOKENS.
        replies: what `data respond` wrote beside the replies that the cache was made of; empty where there is no such file.
        prompts: those of the evaluation.
        use: see :class:`Use`.
        projection: see :class:`Projection`; None without a cache.
        seed: of everything that is drawn.
        template: chat template file, or `none`, that replaces the tokenizer's own; None for that one.
        rendering: the chat template's name and variables.
        quantization: of the target in use; None for whole weights.
        is_right: whether a text answers one of the prompts, by its number; None where nobody judges.
    """

    inputs: CaseInputs
    drafter: Drafter
    trained: Drafter
    ends: TargetEnds
    target: Target | None
    tokenizer: PreTrainedTokenizerBase
    cache: HiddenStateCache | None = None
    samples: tuple[CachedSample, ...] = ()
    replies: Mapping[str, Any] = field(default_factory=dict)
    prompts: tuple[Sample, ...] = ()
    use: Use = UNKNOWN_USE
    projection: Projection | None = None
    seed: int = 0
    template: str | None = None
    rendering: TemplateOptions = NO_OPTIONS
    quantization: str | None = None
    is_right: Callable[[int, str], bool] | None = None

    @property
    def open_cache(self) -> HiddenStateCache:
        """The cache, for checks that cannot do without one.

        Raises:
            NotChecked: none is known.
        """
        if self.cache is None:
            raise NotChecked(self.inputs.no_cache)
        return self.cache

    @property
    def projected(self) -> Projection:
        """The target's likeliest tokens.

        Raises:
            NotChecked: no cache is known.
        """
        _ = self.open_cache
        assert self.projection is not None
        return self.projection

    @property
    def trainable(self) -> Drafter:
        """The trained drafter, of a family that learns from the target's states.

        Raises:
            NotChecked: it is an ordinary draft LM, no cache is known, the cache lacks layers that the drafter reads, or it drafts through
                the target's blocks and only the ends are loaded.
        """
        if isinstance(self.trained, LMDrafter):
            raise NotChecked("an ordinary draft LM reads tokens, not the target's states")
        _ = self.open_cache
        missing = [name for name in self.trained.features if any(name not in sample.hidden for sample in self.samples)]
        if missing:
            raise NotChecked(
                f"the cache lacks {', '.join(missing)}, which this drafter reads: name another with --cache, or leave --ends-only out"
            )
        if self.trained.learns_through_target and self.ends.trunk is None:
            raise NotChecked(
                "this drafter drafts through the target's own blocks: leave --ends-only and --device-map out"
            )
        return self.trained

    @property
    def temperature(self) -> float | None:
        """Temperature of the replies that were trained on, or None where nobody wrote it down."""
        recorded = self.replies.get("settings", {}).get("temperature")
        return None if recorded is None else float(recorded)

    @property
    def eos_ids(self) -> tuple[int, ...]:
        """The tokens that end a reply."""
        return self.ends.eos_token_ids if self.target is None else self.target.eos_token_ids


def find(drafter: str, cache: str | None, target: str | None, revision: str | None, adapter: str | None) -> CaseInputs:
    """Where everything is, from the folder of a run or of a drafter and from what the options add.

    Args:
        drafter: the folder.
        cache, target, revision, adapter: what the options name; None where they leave it to the record.

    Raises:
        ValueError: the folder holds no drafter, or nothing names the target.
    """
    given = Path(drafter)
    if _holds_model(given / "drafter") and not _holds_model(given):
        folder = given / "drafter"
    elif given.is_dir() and not _holds_model(given):
        raise ValueError(
            f"{given} holds no drafter: neither config.json nor drafter/config.json; give the folder of a training run that has "
            "validated once, or of a drafter"
        )
    else:
        folder = drafter_folder(drafter)
    whole = _mapping(provenance.read(folder)) if (folder / provenance.FILE_NAME).is_file() else {}
    record = _mapping(_mapping(whole.get("training", whole)).get("config"))
    trained_from = _mapping(record.get("data")).get("cache")
    there = _is_there(trained_from)
    exported_for = _mapping(whole.get("config")).get("target_name")
    named = target or record.get("target") or _named_target(folder) or exported_for
    if not named:
        raise ValueError(f"{folder} does not tell its target; name it with --target")
    return CaseInputs(
        folder=folder,
        origin=_origin(whole, folder) if "training" in whole else None,
        record=record,
        target=named,
        revision=revision or record.get("revision"),
        adapter=adapter or record.get("adapter"),
        cache=cache or (trained_from if there else None),
        lost_cache=None if there or cache else trained_from,
        exported="training" in whole,
    )


def _mapping(value: object) -> Mapping[str, Any]:
    """A part of a record, empty where the record holds something else there: it may be of other software, or edited."""
    return value if isinstance(value, dict) else {}


def _holds_model(folder: Path) -> bool:
    """Whether it is a drafter's folder, a draft LM's, or that of an adapter on one of them."""
    return any((folder / name).is_file() for name in ("config.json", "adapter_config.json"))


def _named_target(folder: Path) -> str:
    """The target that a drafter's config names, or that of a folder of the speculators package; empty where it names none."""
    fields = _config(folder)
    return str(fields.get("target_name") or verifier_name(fields))


def names_target(folder: Path) -> bool:
    """Whether a drafter's folder tells, by a fingerprint, which target it was made for. Folders of other software do not.

    Args:
        folder: of a drafter.

    Returns:
        True where its config does, or the record of the export that wrote it; and for a folder whose drafter lies in another one.
    """
    fields = _config(folder)
    if not fields or "target_fingerprint" in fields or str(fields.get("model_type")) in COMPOSED:
        return True
    record = provenance.read(folder) if (folder / provenance.FILE_NAME).is_file() else {}
    return bool(_mapping(_mapping(record).get("config")).get("target_fingerprint"))


def _config(folder: Path) -> Mapping[str, Any]:
    """What config.json says; empty where there is none."""
    file = folder / "config.json"
    return parse_json_object(file.read_bytes(), str(file), "copy or export the drafter again") if file.is_file() else {}


def _origin(exported: Mapping[str, Any], folder: Path) -> Path | None:
    """Where an export was made of: the input that is a drafter's weights; None where an adapter was merged into them."""
    inputs = list(_mapping(exported.get("inputs")))
    if any((Path(name) / BOND).is_file() for name in inputs):
        return None
    for name in inputs:
        path = Path(name)
        if path.suffix == ".safetensors" and path.is_file() and path.parent.resolve() != folder.resolve():
            return path.parent
    return None


def _is_there(cache: str | None) -> bool:
    """Whether a cache can be opened where a record names it (an address with a scheme is taken at its word)."""
    return cache is not None and ("://" in cache or Path(cache).is_dir())


def load_served(folder: Path, ends: TargetEnds, dtype: str, trust_remote_code: bool = False) -> Drafter:
    """A drafter attached to the target, whatever target it names: whether it is that one is a check of its own.

    Raises:
        ValueError: the folder holds no whole drafter, or one of other shapes.
    """
    try:
        # Not only finite numbers: `drafter-file` looks for NaN.
        drafter = load_drafter(folder, dtype, trust_remote_code, finite=False, target=TargetBond(ends))
    except SafetensorError as error:
        raise ValueError(
            f"the weights in {folder} cannot be read ({error}): copy or export the drafter again"
        ) from error
    torch.nn.Module.to(drafter, ends.device)
    return drafter.eval().for_any_target().bound(ends)


def replies_of(cache: HiddenStateCache) -> Mapping[str, Any]:
    """What `data respond` wrote beside the replies that a cache was made of; empty where that cannot be found."""
    if not is_local(cache) or not (Path(cache.path) / provenance.FILE_NAME).is_file():
        return {}
    for name in _mapping(provenance.read(Path(cache.path)).get("inputs")):
        folder = Path(name).parent if Path(name).is_file() else Path(name)
        if any(folder.glob(RESPONSE_GLOB)):
            for file in sorted(folder.glob("settings*.json")):
                return parse_json_object(file.read_bytes(), str(file), "copy the replies again, with all their files")
    return {}


def draw(cache: HiddenStateCache, count: int, seed: int) -> tuple[CachedSample, ...]:
    """`count` samples of a cache (all, where it has fewer), drawn at random, in their order, cut to MAX_TOKENS."""
    generator = torch.Generator().manual_seed(seed)
    within = torch.arange(len(cache)) if is_local(cache) else _of_some_shards(cache, generator)
    chosen = within[torch.randperm(len(within), generator=generator)[:count]]
    return tuple(portion(cache[index], 0, MAX_TOKENS) for index in sorted(chosen.tolist()))


def is_local(cache: HiddenStateCache) -> bool:
    """Whether samples are read from this machine's disk, and not with their whole shard over a network."""
    return isinstance(cache.path, Path)


def _of_some_shards(cache: HiddenStateCache, generator: torch.Generator) -> Tensor:
    """int64: the samples of a few shards drawn at random, since each of them is fetched whole."""
    counts = torch.tensor([shard.num_samples for shard in cache.manifest.shards])
    starts = counts.cumsum(0) - counts
    drawn = torch.randperm(len(counts), generator=generator)[:_FETCHED].tolist()
    return torch.cat([torch.arange(int(starts[number]), int(starts[number] + counts[number])) for number in drawn])


def fresh_states(
    target: Target, sample: CachedSample, layers: tuple[str, ...], most: int | None = None
) -> TargetOutput:
    """What extraction would store of the sample's first tokens, ``most`` at the most: the states of one forward, [1, T, D] each."""
    ids = sample.input_ids[None, :most].to(target.device)
    return target.prefix(ids, layers, read=prompt_lengths([sample.loss_mask], target.device))


def with_states(sample: CachedSample, layers: Sequence[str], target: Target) -> CachedSample:
    """The sample with the layers that its cache lacks, computed now: a run with the target in the loop keeps none."""
    missing = tuple(name for name in layers if name not in sample.hidden)
    if not missing:
        return sample
    output = fresh_states(target, sample, missing)
    # Cloned outside of inference mode, so that a trial training may use them.
    fresh = {name: output.feature(name)[0].cpu().clone() for name in missing}
    return replace(sample, hidden={**sample.hidden, **fresh})


def portion(sample: CachedSample, start: int, stop: int) -> CachedSample:
    """The sample's tokens `start` to `stop - 1` with all that belongs to them."""
    if start == 0 and stop >= len(sample.input_ids):
        return sample  # states of eight bits stay in the file
    return replace(
        sample,
        input_ids=sample.input_ids[start:stop],
        loss_mask=sample.loss_mask[start:stop],
        hidden={name: states[start:stop] for name, states in sample.hidden.items()},
        greedy_ids=None if sample.greedy_ids is None else sample.greedy_ids[start:stop],
    )


def has_pre_norm(cache: HiddenStateCache) -> bool:
    """Whether the last block's states are in it."""
    return PRE_NORM in cache.manifest.identity.layers
