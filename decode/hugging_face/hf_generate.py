"""``model.generate(..., custom_generate=FOLDER)``: Transformers' arguments in, this package's decoding, Transformers' tensor out.

Owns the way between the two, and the drafter that a model keeps; :mod:`draftsmith.decode.hugging_face.hf_request` reads the arguments.
``draftsmith export --layout custom_generate`` copies this module into a drafter's folder as ``custom_generate/generate.py``, with the
modules it imports: it must do with torch and transformers, and touch no registry of theirs. Knows nothing of that copying.

Shape legend: B rows, T prompt tokens, padding included, L new tokens.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeGuard, cast

import torch
from torch import Tensor, nn
from transformers import GenerationConfig, PreTrainedModel
from transformers.generation import (
    GenerateDecoderOnlyOutput,
    GenerationMixin,
    StoppingCriteria,
)
from transformers.generation.streamers import BaseStreamer
from transformers.utils import cached_file

from draftsmith.decode.batch import Generation
from draftsmith.decode.engine import Engine
from draftsmith.decode.hugging_face.hf_request import (
    refuse_arguments,
    refuse_cache,
    refuse_config,
    request_settings,
    split_criteria,
    take_stop_strings,
    until_of,
    without_stop_strings,
)
from draftsmith.decode.sampling import GenerationSettings
from draftsmith.json_text import parse_json_object
from draftsmith.models.branches import default_for
from draftsmith.models.drafters.drafter import Drafter
from draftsmith.models.drafters.drafter_reader import read_drafter
from draftsmith.models.drafters.registry import drafter_class
from draftsmith.models.evaluating import evaluating
from draftsmith.models.files.checkpoint_files import read_fields
from draftsmith.models.files.field_rules import COUNT_OR_NULL, LIST, Rule, check_fields, is_number, is_whole
from draftsmith.models.target.target import Target
from draftsmith.models.target.target_probe import other_ends
from draftsmith.models.tree.kept_shapes import SHAPES_FILE
from draftsmith.models.tree.limits import DraftLimits
from draftsmith.models.tree.shapes_by_rows import ShapesByRows

CONFIG, WEIGHTS, SETTINGS = "config.json", "model.safetensors", "custom_generate/settings.json"
LIMITS = ("beam_width", "draft_length", "node_budget", "paths")
_SETTINGS_RULES: dict[str, Rule] = {
    "limits": (
        lambda value: isinstance(value, dict) and value.keys() <= set(LIMITS) and _are_limits(value),
        f"an object of {', '.join(LIMITS)}, each a whole number of at least 1 or null, paths lists of ranks or null",
    ),
    "target_ends": (
        lambda value: (
            isinstance(value, dict) and all(LIST[0](item) and all(map(is_number, item)) for item in value.values())
        ),
        "an object of lists of numbers",
    ),
}

_HUB = ("revision", "token", "cache_dir", "local_files_only", "force_download", "proxies")
_ATTRIBUTE = "_draftsmith_served"


def generate(
    model: PreTrainedModel,
    inputs: Tensor | None = None,
    generation_config: GenerationConfig | None = None,
    streamer: BaseStreamer | None = None,
    drafter: str | Path | None = None,
    **kwargs: Any,
) -> Tensor | GenerateDecoderOnlyOutput:
    """Decode with the drafter of this folder: what ``model.generate`` would give without it, in fewer forwards.

    At ``do_sample=False`` the tokens are the model's own; at ``do_sample=True`` they have its distribution, drawn from a seed that torch's
    global generator gives. Rows may be padded on the left (or anywhere, with an ``attention_mask``). Decoding ends at the model's context
    also where ``max_length`` would go beyond.

    Args:
        model: the target that the drafter was trained for.
        inputs: int64 [B, T], or ``input_ids`` among ``kwargs``.
        generation_config: as in ``model.generate``; of its processors the repetition penalty, temperature, top-k, top-p and min-p work,
            and every stopping criterion; each is called after every token, with one row.
        streamer: gets the tokens as they become final; one row only.
        drafter: folder or hub id of the drafter; by default what the caller gave as ``custom_generate``.
        kwargs: ``beam_width``, ``draft_length``, ``node_budget`` (None: no budget) and ``paths`` for this call's drafts; arguments of the
            hub (``revision``, ``token`` ...); and whatever else ``model.generate`` takes.

    Returns:
        int64 [B, T + L]: prompts and replies, replies padded on the right; with ``return_dict_in_generate`` as its ``sequences``.

    Raises:
        ValueError: the folder holds no whole drafter, it is another model's, or an argument asks for what decoding here cannot do.
    """
    hub = {name: kwargs.pop(name) for name in _HUB if name in kwargs}
    given = {name: kwargs.pop(name) for name in LIMITS if name in kwargs}
    refuse_arguments(kwargs)
    refuse_cache(generation_config or model.generation_config, kwargs)
    generation_config, kwargs["stopping_criteria"] = take_stop_strings(model, generation_config, kwargs)
    served = _serve(model, str(drafter or _asked_for()), hub)
    limits = _limits(served, given) if given or served.kept is None else served.kept

    decode = _decoder(served, limits, streamer)
    # Transformers prepares prompts, masks, lengths and processors as for its own decoding, and then calls `decode`.
    prepare: Any = GenerationMixin.generate
    with without_stop_strings(model):
        return prepare(
            model, inputs, generation_config=generation_config, streamer=streamer, custom_generate=decode, **kwargs
        )


def _decoder(
    served: _Served, limits: DraftLimits | ShapesByRows, streamer: BaseStreamer | None
) -> Callable[..., Tensor | GenerateDecoderOnlyOutput]:
    """What Transformers calls once it has prepared prompts, masks, lengths and processors."""

    def decode(
        model: PreTrainedModel,
        input_ids: Tensor,
        logits_processor: Iterable[object],
        stopping_criteria: Iterable[StoppingCriteria],
        generation_config: GenerationConfig,
        **prepared: Any,
    ) -> Tensor | GenerateDecoderOnlyOutput:
        refuse_config(generation_config, prepared)
        own, others = split_criteria(stopping_criteria)
        settings = request_settings(generation_config, logits_processor, own, input_ids.shape[1])
        prompts = _prompts(input_ids, prepared.get("attention_mask"))
        if streamer is not None and len(prompts) > 1:
            raise ValueError(f"a streamer shows one reply, but {len(prompts)} rows are asked for; leave it out")
        with _frozen(model):
            engine = Engine(served.target, served.drafter, limits)
            feed = None if streamer is None else _feeder(streamer)
            replies = engine.generate(prompts, settings, feed, until=until_of(others, input_ids) if others else None)
        if streamer is not None:
            streamer.end()
        sequences = _joined(input_ids, replies, generation_config, settings)
        if generation_config.return_dict_in_generate:
            return GenerateDecoderOnlyOutput(sequences=cast(torch.LongTensor, sequences))
        return sequences

    return decode


def _are_limits(value: Mapping[str, Any]) -> bool:
    """Whether fields of a file can be limits; which numbers go together is the limits' own affair."""
    paths = value.get("paths")
    ranks = [rank for path in paths for rank in path] if _is_list_of_lists(paths) else []
    return (paths is None or (_is_list_of_lists(paths) and all(is_whole(rank, 0) for rank in ranks))) and all(
        COUNT_OR_NULL[0](number) for name, number in value.items() if name != "paths"
    )


def _is_list_of_lists(value: object) -> TypeGuard[list[list[Any]]]:
    return isinstance(value, list) and all(isinstance(item, list) for item in value)


def _limits(served: _Served, given: Mapping[str, Any]) -> DraftLimits:
    """The limits of one call. One that says anything of its own is not drafted for with the default static tree."""
    chosen = {**served.limits, **given}
    if given and "paths" not in given:
        chosen["paths"] = None
    paths = chosen.pop("paths", None)
    limits = DraftLimits(**chosen, paths=None if paths is None else tuple(map(tuple, paths)))
    asks_for_branches = not given.keys() <= {"draft_length"}
    return limits if asks_for_branches else default_for(served.target, limits)


@dataclass(frozen=True)
class _Served:
    """A model with its drafter: from where (path, size and time of the files, kind of device), and the limits by default.

    Where `draftsmith tune` kept shapes that fit this machine and target, ``kept`` holds them and they come before these limits.
    """

    origin: tuple[Any, ...]
    target: Target
    drafter: Drafter
    limits: dict[str, Any]
    kept: ShapesByRows | None


def _serve(model: PreTrainedModel, name: str, hub: Mapping[str, Any]) -> _Served:
    """The model's wrapping and the drafter; kept on the model, since both take some forwards and reads to make."""
    folder = _folder(name, hub)
    files = [(folder / file).stat() for file in (WEIGHTS, SHAPES_FILE) if (folder / file).is_file()]
    attention = getattr(model.config.get_text_config(), "_attn_implementation", None)
    parts = (model.get_input_embeddings(), model.get_output_embeddings(), attention)
    stamps = [(file.st_mtime_ns, file.st_size) for file in files]
    origin = (folder.resolve(), stamps, model.device.type)
    # By module: copies of this file that other drafters brought along have classes of their own.
    kept: dict[str, tuple[Any, _Served]] = vars(model).setdefault(_ATTRIBUTE, {})
    known_parts, served = kept.get(__name__, (None, None))
    if served is None or known_parts != parts:
        with _frozen(model):
            target = Target(model, model.name_or_path or type(model).__name__, fingerprint="")
        served = None
    else:
        target = served.target
    if served is None or served.origin != origin:
        drafter, limits = _load(folder, target)
        served = _Served(origin, target, drafter, limits, drafter.kept_shapes(target))
        kept[__name__] = (parts, served)
    nn.Module.to(served.drafter, target.device)
    return served


@contextmanager
def _frozen(model: PreTrainedModel) -> Iterator[None]:
    """Evaluation mode without gradients inside; afterwards the model is as trainable as it was."""
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    try:
        with evaluating(model):
            yield
    finally:
        for parameter in trainable:
            parameter.requires_grad_(True)


def _asked_for() -> str:
    """What the caller of ``model.generate`` gave as ``custom_generate``.

    Transformers does not hand it on to the function that it loads from there, and runs a copy whose own path does not tell it either, so it
    is read in the frame of that call.

    Raises:
        ValueError: this was not called by ``model.generate``.
    """
    frame = inspect.currentframe()
    while frame is not None:
        if frame.f_code.co_name == "generate" and isinstance(frame.f_locals.get("custom_generate"), str):
            return frame.f_locals["custom_generate"]
        frame = frame.f_back
    raise ValueError("where the drafter lies is not known here; say so with drafter='path/or/hub-id'")


def _folder(name: str, hub: Mapping[str, Any]) -> Path:
    """Where the drafter's files lie on this disk.

    Raises:
        ValueError: one of them cannot be had.
    """
    try:
        config, *_ = [cached_file(name, file, **hub) for file in (CONFIG, WEIGHTS, SETTINGS)]
        # Few folders hold this one; of the hub it comes into the same folder.
        cached_file(
            name,
            SHAPES_FILE,
            _raise_exceptions_for_missing_entries=False,
            _raise_exceptions_for_connection_errors=False,
            **hub,
        )
    except OSError as error:
        raise ValueError(
            f"{name} is no drafter that `draftsmith export --layout custom_generate` wrote: {error}"
        ) from error
    assert config is not None
    return Path(config).parent


def _load(folder: Path, target: Target) -> tuple[Drafter, dict[str, Any]]:
    """The drafter, attached to its target, and how much it drafts by default.

    Raises:
        ValueError: it is not whole, or another model's.
    """
    drafter = read_drafter(folder, drafter_class(str(read_fields(folder).get("model_type"))))
    settings = parse_json_object((folder / SETTINGS).read_bytes(), str(folder / SETTINGS), "export the drafter again")
    check_fields(
        settings, _SETTINGS_RULES, str(folder / SETTINGS), "export the drafter again", required=_SETTINGS_RULES
    )
    drafter.attach(target.ends)
    different = other_ends(target.ends, settings["target_ends"])
    if different:
        raise ValueError(
            f"this drafter was made for target {drafter.config.target_name!r}, and {target.name!r} has other weights "
            f"({', '.join(different)}); use that target, or train a drafter for this one"
        )
    return drafter, settings["limits"]


def _prompts(input_ids: Tensor, mask: Tensor | None) -> list[list[int]]:
    """[B, T] each -> the token ids of each row that are not masked."""
    if mask is None:
        return input_ids.tolist()
    return [ids[kept].tolist() for ids, kept in zip(input_ids, mask.to(input_ids.device).bool(), strict=True)]


def _feeder(streamer: BaseStreamer) -> Callable[[int, list[int]], None]:
    def feed(request: int, tokens: list[int]) -> None:
        for token in tokens:
            streamer.put(torch.tensor([token]))

    return feed


def _joined(
    input_ids: Tensor, replies: list[Generation], config: GenerationConfig, settings: GenerationSettings
) -> Tensor:
    """[B, T] and the replies -> [B, T + L], padded as Transformers does: with the pad token, else the first end-of-sequence token."""
    padding = config.pad_token_id
    if padding is None:
        padding = settings.eos_token_ids[0] if settings.eos_token_ids else 0
    longest = max(len(reply.token_ids) for reply in replies)
    rows = [reply.token_ids + [int(padding)] * (longest - len(reply.token_ids)) for reply in replies]
    return torch.cat([input_ids, torch.tensor(rows, dtype=input_ids.dtype, device=input_ids.device)], dim=1)
