"""The one door through which a folder in Hugging Face's form becomes a config, a tokenizer or a model.

Owns two rules: Python files of the folder run only where the caller allows it, and a model is whole or an error. Knows nothing of
paths, devices, targets and drafters. Everything else in the package loads through here; a test of the house checks that.
"""

from __future__ import annotations

import itertools
import logging
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoTokenizer,
    GenerationConfig,
    GgufConfig,
    PreTrainedConfig,
    PreTrainedTokenizerBase,
)
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
)

from draftsmith.json_text import parse_json_object
from draftsmith.models.files.checkpoint_files import mtp_beginnings
from draftsmith.models.files.field_rules import safe_file_name

_LOG = logging.getLogger(__name__)
_TOLD_FROM = 4 * 2**30  # bytes of weights; fewer are read in a moment

RAISED_BY_CONFIGS = (
    AssertionError,
    AttributeError,
    IndexError,
    KeyError,
    OverflowError,
    RuntimeError,
    StrictDataclassError,
    TypeError,
    ValueError,
    ZeroDivisionError,
)
"""What Transformers raises where a config's values make no model."""
_RAISED_BY_FILES = (*RAISED_BY_CONFIGS, ImportError, OSError, SafetensorError)
_ADAPTER = "adapter_config.json"
_ATTENTIONS = (None, "sdpa", "eager")
# Masks that old releases of Transformers saved with some families (GPT-J, CodeGen), and that each model computes by itself.
_COMPUTED = re.compile(r"\.attn\.(bias|masked_bias|causal_mask)")
_SHOWN = 3  # names of tensors that an error lists
_REMEDY = "its weights and its config.json belong to different models: give the complete checkpoint of one"


def read_config(folder: Path, trust_remote_code: bool = False) -> PreTrainedConfig:
    """Read the model config in a folder.

    Args:
        folder: of the model.
        trust_remote_code: whether Python files of the folder may run.

    Returns:
        The config.

    Raises:
        ValueError: it cannot be read, it asks for an attention that takes no tree mask, or it needs code that may not run.
    """
    with _naming_the_folder(folder):
        config = AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
    _check_attention(config, folder)
    return config


def read_tokenizer(folder: Path, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    """Read the tokenizer in a folder.

    Args:
        folder: of the model.
        trust_remote_code: whether Python files of the folder may run.

    Returns:
        The tokenizer.

    Raises:
        ValueError: it cannot be read, or it needs code of the folder, and that is not allowed.
    """
    with _naming_the_folder(folder):
        return cast(PreTrainedTokenizerBase, AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code))


def read_generation_config(folder: Path) -> GenerationConfig | None:
    """Read the generation config in a folder.

    Args:
        folder: of the model.

    Returns:
        The config; None where the folder has no such file.

    Raises:
        ValueError: it cannot be read.
    """
    if not (folder / "generation_config.json").is_file():
        return None
    with _naming_the_folder(folder):
        return GenerationConfig.from_pretrained(folder)


def language_model_class(config: PreTrainedConfig, folder: Path) -> type[Any]:
    """Choose the Auto class that opens a checkpoint as a model that writes text.

    Args:
        config: of the checkpoint.
        folder: for the message.

    Returns:
        A class of Transformers.

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
    """Read a whole model from the safetensors in a folder.

    Args:
        kind: a model's class, or one of Transformers' Auto classes.
        folder: where config and weights are.
        trust_remote_code: whether Python files of the folder may run.
        arguments: more for ``from_pretrained``, such as ``dtype`` and ``config``.

    Returns:
        The model.

    Raises:
        ValueError: a file cannot be read; a tensor is missing, unknown or of another shape; or the folder holds an adapter, too. Also for
            a model that needs code of the folder, where that is not allowed.
    """
    if arguments.get("device_map") != "meta":
        announce_reading(folder)
    model, report = _load(kind, folder, trust_remote_code, **arguments)
    refuse_faults(folder, report)
    return model


def check_tensors(kind: type[Any], folder: Path, trust_remote_code: bool = False, **arguments: Any) -> None:
    """Check all tensors of a folder against its config by names and shapes alone; no weight is read.

    Args:
        kind: a model's class, or one of Transformers' Auto classes.
        folder: where config and weights are.
        trust_remote_code: whether Python files of the folder may run.
        arguments: more for ``from_pretrained``.

    Raises:
        ValueError: as :func:`read_model`.
    """
    read_model(kind, folder, trust_remote_code, device_map="meta", **arguments)


def read_part(
    kind: type[Any],
    folder: Path,
    needed: Callable[[Any], Sequence[str]],
    trust_remote_code: bool = False,
    **arguments: Any,
) -> Any:
    """Read a model whose config leaves out layers that the folder holds.

    Tensors beside the needed ones are not judged: :func:`check_tensors` of the whole config does that.

    Args:
        kind: a model's class, or one of Transformers' Auto classes.
        folder: where config and weights are.
        needed: of the model, the names of the modules that must be whole.
        trust_remote_code: whether Python files of the folder may run.
        arguments: more for ``from_pretrained``, such as the shortened ``config``.

    Returns:
        The model; what is not needed may be random.

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
    """Put the PEFT adapter of a folder into a model. PEFT runs no code of the folder.

    Args:
        kind: PEFT's ``PeftModel``.
        model: to be adapted.
        folder: of the adapter.

    Returns:
        The adapted model.
    """
    return kind.from_pretrained(model, str(folder))


def read_gguf(folder: Path, name: str, shown: Path, tensors: Iterable[str]) -> Any:
    """Read a model from a GGUF file, which holds no code; the weights are dequantised to float32.

    Args:
        folder: that holds the file and nothing else.
        name: of the file.
        shown: the file's path for messages.
        tensors: names of all tensors in the file.

    Returns:
        The model, which can be saved.

    Raises:
        ValueError: the file cannot be read, or a tensor is missing, unknown or of another shape.
    """
    with _naming_the_folder(shown, "give another file, or the model's folder with safetensors"):
        config = AutoConfig.from_pretrained(folder, gguf_file=name, trust_remote_code=False)
        with torch.device("meta"):
            empty = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
        unread = _unread_tensors(empty, tensors)
        kind: Any = AutoModelForCausalLM
        model, report = kind.from_pretrained(
            folder,
            gguf_file=name,
            config=config,
            dtype=torch.float32,
            quantization_config=GgufConfig(dequantize=True),
            output_loading_info=True,
            ignore_mismatched_sizes=True,
            trust_remote_code=False,
        )
    shapes = {key: tensor.shape for key, tensor in empty.state_dict().items()}
    # Some versions of Transformers put a tensor of another size in place and report nothing.
    mismatched = {(key,) for key, tensor in model.state_dict().items() if tensor.shape != shapes[key]}
    faults = {
        "unexpected_keys": {*report["unexpected_keys"], *unread},
        "mismatched_keys": {*report["mismatched_keys"], *mismatched},
    }
    refuse_faults(shown, report | faults)
    return model


def _unread_tensors(model: Any, names: Iterable[str]) -> set[str]:
    """Names of a GGUF file's tensors that Transformers would pass over without a word, such as a table of rope factors."""
    from transformers.modeling_gguf_pytorch_utils import TENSOR_PROCESSORS, TensorProcessor, get_gguf_hf_weights_map

    kind = TENSOR_PROCESSORS.get(model.config.model_type.replace("_", ""), TensorProcessor)
    known = get_gguf_hf_weights_map(model, kind(config=model.config.to_dict()))
    return {name for name in names if name not in known and name.removesuffix(".weight") not in known}


def refuse_faults(folder: Path, report: Mapping[str, Iterable[Any]]) -> None:
    """Judge what the loader reports.

    Args:
        folder: for the message.
        report: the loader's ``output_loading_info``; Transformers has taken out what a family may lack or have beside. Tensors of an
            MTP layer pass, too.

    Raises:
        ValueError: a tensor is missing, unknown or of another shape.
    """
    drafters = tuple(itertools.chain.from_iterable(mtp_beginnings(report["unexpected_keys"]).values()))
    unexpected = [name for name in report["unexpected_keys"] if not _COMPUTED.search(name)]
    faults = {
        "missing keys": sorted(report["missing_keys"]),
        "unexpected keys": sorted(name for name in unexpected if not name.startswith(drafters)),
        "mismatched shapes": sorted(str(mismatch[0]) for mismatch in report["mismatched_keys"]),
    }
    if any(faults.values()):
        raise ValueError(f"{folder} is not a whole model ({name_faults(faults)}); {_REMEDY}")


def name_faults(faults: Mapping[str, Iterable[str]]) -> str:
    """Name kinds of faults with the names that they concern, shortened.

    Example: ``missing: a, b, c, ... (7 in all); unexpected: d``.

    Args:
        faults: names by kind.

    Returns:
        The text; empty where no kind has a name.
    """
    parts = []
    for kind, listed in faults.items():
        names = list(listed)
        rest = f", ... ({len(names)} in all)" if len(names) > _SHOWN else ""
        if names:
            parts.append(f"{kind}: {', '.join(names[:_SHOWN])}{rest}")
    return "; ".join(parts)


def _check_attention(config: PreTrainedConfig, folder: Path) -> None:
    """Refuse kernels by name, which Transformers would fetch from the hub."""
    parts = [config, *(getattr(config, name, None) for name in config.sub_configs)]
    for asked in (getattr(part, "_attn_implementation", None) for part in parts):
        if asked not in _ATTENTIONS:
            raise ValueError(
                f"{folder / 'config.json'} asks for attn_implementation {asked!r:.80}, which takes no tree mask; take the field out, or "
                "write 'sdpa' or 'eager'"
            )


def _load(kind: type[Any], folder: Path, trust_remote_code: bool, **arguments: Any) -> tuple[Any, dict[str, Any]]:
    _check_file_names(folder)
    if (folder / _ADAPTER).exists():
        # Transformers would put it into the model without a word, and report on the adapter's tensors alone.
        raise ValueError(
            f"{folder} holds a model and a PEFT adapter ({_ADAPTER}); move the adapter's files to a folder of their own and give that as "
            "--adapter, or delete them if the weights contain it"
        )
    with _naming_the_folder(folder):
        # Tensors of other shapes are let through here: the report tells them with the rest.
        return kind.from_pretrained(
            folder,
            trust_remote_code=trust_remote_code,
            use_safetensors=True,
            output_loading_info=True,
            ignore_mismatched_sizes=True,
            **arguments,
        )


def announce_reading(folder: Path) -> None:
    """Log a line if a folder holds so many bytes of weights that reading them may take minutes.

    Args:
        folder: with ``*.safetensors``.
    """
    num_bytes = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    if num_bytes >= _TOLD_FROM:
        _LOG.info("reading %.1f GB of weights from %s", num_bytes / 1e9, folder)


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
def _naming_the_folder(
    folder: Path, remedy: str = "give a complete checkpoint with its own config.json"
) -> Iterator[None]:
    """Makes one error that names the folder of whatever Transformers raises at its files; a refusal to run code names our option."""
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except _RAISED_BY_FILES as error:
        if "trust_remote_code" in str(error):
            raise ValueError(
                f"{folder} needs Python files of its own (auto_map in its JSON files), which never run unasked; read them, and allow "
                "them with --trust_remote_code true"
            ) from error
        reason = " ".join(str(error).split())
        if isinstance(error, ImportError):
            raise ValueError(f"{folder} needs a package that is not installed: {reason:.400}") from error
        raise ValueError(f"{folder} cannot be read ({type(error).__name__}: {reason:.400}); {remedy}") from error
