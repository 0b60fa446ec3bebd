"""The one door through which a folder in Hugging Face's form becomes a config, a tokenizer or a model.

Owns two rules: Python files of the folder run only where the caller allows it, and a model is whole or an error. Knows nothing of
paths, devices, targets and drafters. Everything else in the package loads through here, which a test of the house holds it to.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedConfig,
    PreTrainedTokenizerBase,
)
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
)

from draftsmith.outside import parse_json_object, safe_file_name

_SHOWN = 3  # names of tensors that an error lists
_REMEDY = "its weights and its config.json belong to different models: give the complete checkpoint of one"


def read_config(folder: Path, trust_remote_code: bool = False) -> PreTrainedConfig:
    """The model config in a folder.

    Raises:
        ValueError: it needs code of the folder, and that is not allowed.
    """
    with _naming_the_option(folder):
        return AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)


def read_tokenizer(folder: Path, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    """The tokenizer in a folder.

    Raises:
        ValueError: it needs code of the folder, and that is not allowed.
    """
    with _naming_the_option(folder):
        return cast(PreTrainedTokenizerBase, AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code))


def read_generation_config(folder: Path) -> GenerationConfig | None:
    """The generation config in a folder; None where it has no such file."""
    return GenerationConfig.from_pretrained(folder) if (folder / "generation_config.json").is_file() else None


def language_model_class(config: PreTrainedConfig, folder: Path) -> type[Any]:
    """The Auto class that opens a checkpoint with this config as a model that writes text.

    Raises:
        ValueError: Transformers has none for it, and neither has the folder.
    """
    if config.model_type in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        return AutoModelForCausalLM
    if config.model_type in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES:
        return AutoModelForImageTextToText
    if "AutoModelForCausalLM" in (getattr(config, "auto_map", None) or {}):
        return AutoModelForCausalLM
    raise ValueError(
        f"{folder} holds a {config.model_type!r}, which Transformers cannot run as a language model; give a causal LM, or a multimodal "
        "model that writes text"
    )


def read_model(kind: type[Any], folder: Path, trust_remote_code: bool = False, **arguments: Any) -> Any:
    """A whole model from the safetensors in a folder.

    Args:
        kind: a model's class, or one of Transformers' Auto classes.
        folder: where config and weights are.
        trust_remote_code: whether Python files of the folder may run.
        arguments: more for ``from_pretrained``, such as ``dtype`` and ``config``.

    Raises:
        ValueError: a tensor is missing, unknown or of another shape; or the model needs code of the folder, and that is not allowed.
    """
    model, report = _load(kind, folder, trust_remote_code, **arguments)
    refuse_faults(folder, report)
    return model


def check_tensors(kind: type[Any], folder: Path, trust_remote_code: bool = False, **arguments: Any) -> None:
    """Hold all tensors of a folder to its config by names and shapes alone; no weight is read.

    Arguments and errors as for :func:`read_model`.
    """
    read_model(kind, folder, trust_remote_code, device_map="meta", **arguments)


def read_part(
    kind: type[Any],
    folder: Path,
    needed: Callable[[Any], Sequence[str]],
    trust_remote_code: bool = False,
    **arguments: Any,
) -> Any:
    """A model whose config leaves out layers that the folder holds.

    Tensors beside the needed ones are not judged: :func:`check_tensors` of the whole config does that.

    Args:
        kind: a model's class, or one of Transformers' Auto classes.
        folder: where config and weights are.
        needed: of the model, the names of the modules that must be whole.
        trust_remote_code: whether Python files of the folder may run.
        arguments: more for ``from_pretrained``, such as the shortened ``config``.

    Raises:
        ValueError: a needed tensor is missing or of another shape; or the model needs code of the folder, and that is not allowed.
    """
    model, report = _load(kind, folder, trust_remote_code, **arguments)
    prefixes = tuple(f"{name}." for name in needed(model))
    missing = [name for name in report["missing_keys"] if name.startswith(prefixes)]
    mismatched = [mismatch for mismatch in report["mismatched_keys"] if mismatch[0].startswith(prefixes)]
    refuse_faults(folder, {"missing_keys": missing, "unexpected_keys": (), "mismatched_keys": mismatched})
    return model


def read_adapter(kind: type[Any], model: Any, folder: Path) -> Any:
    """A model with the PEFT adapter of a folder in it; ``kind`` is PEFT's ``PeftModel``. PEFT runs no code of the folder."""
    return kind.from_pretrained(model, str(folder))


def refuse_faults(folder: Path, report: Mapping[str, Iterable[Any]]) -> None:
    """Judge what the loader reports.

    Args:
        folder: for the message.
        report: the loader's ``output_loading_info``; Transformers has taken out what a family may lack or have beside.

    Raises:
        ValueError: a tensor is missing, unknown or of another shape.
    """
    faults = {
        "missing keys": sorted(report["missing_keys"]),
        "unexpected keys": sorted(report["unexpected_keys"]),
        "mismatched shapes": sorted(str(mismatch[0]) for mismatch in report["mismatched_keys"]),
    }
    if any(faults.values()):
        raise ValueError(f"{folder} is not a whole model ({name_faults(faults)}); {_REMEDY}")


def name_faults(faults: Mapping[str, Iterable[str]]) -> str:
    """Kinds of faults with the names that they concern, shortened.

    Example: ``missing: a, b, c, ... (7 in all); unexpected: d``.
    """
    parts = []
    for kind, listed in faults.items():
        names = list(listed)
        rest = f", ... ({len(names)} in all)" if len(names) > _SHOWN else ""
        if names:
            parts.append(f"{kind}: {', '.join(names[:_SHOWN])}{rest}")
    return "; ".join(parts)


def _load(kind: type[Any], folder: Path, trust_remote_code: bool, **arguments: Any) -> tuple[Any, dict[str, Any]]:
    _check_file_names(folder)
    with _naming_the_option(folder), _naming_the_folder(folder):
        # Tensors of other shapes are let through here: the report tells them with the rest.
        return kind.from_pretrained(
            folder,
            trust_remote_code=trust_remote_code,
            use_safetensors=True,
            output_loading_info=True,
            ignore_mismatched_sizes=True,
            **arguments,
        )


def _check_file_names(folder: Path) -> None:
    """Refuse an index of weights that names files outside of its folder, which the loader would open."""
    for index in folder.glob("*.safetensors.index.json"):
        remedy = "give a complete checkpoint"
        listed = parse_json_object(index.read_bytes(), str(index), remedy).get("weight_map")
        if not isinstance(listed, dict):
            raise ValueError(f"{index} has no weight_map, an object of file names; {remedy}")
        for tensor, name in listed.items():
            safe_file_name(name, f"{index}: the file of {tensor!r:.80}")


@contextmanager
def _naming_the_option(folder: Path) -> Iterator[None]:
    """Has Transformers' refusal to run code name our option."""
    try:
        yield
    except ValueError as error:
        if "trust_remote_code" not in str(error):
            raise
        raise ValueError(
            f"{folder} needs Python files of its own (auto_map in its JSON files), which never run unasked; read them, and allow them "
            "with --trust_remote_code true"
        ) from error


@contextmanager
def _naming_the_folder(folder: Path) -> Iterator[None]:
    """Has a loader that fails on weights, as where experts are to be stacked and some are missing, name the folder."""
    try:
        yield
    except RuntimeError as error:
        if "conversion of the weights" not in str(error) and "loading state_dict" not in str(error):
            raise
        raise ValueError(
            f"the weights in {folder} do not fit its config.json ({error}); give a complete checkpoint, or its own config.json"
        ) from error
