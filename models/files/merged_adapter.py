"""A PEFT adapter merged into a target's weights.

Owns what an adapter must be, and that the merged target is the adapted one where embedding and head share a weight. Knows no drafter,
and not where adapters lie (`adapter_files.py`).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from peft import PeftModel, get_peft_model_state_dict
from torch import nn

from draftsmith.models.files.adapter_files import CONFIG, reaches, read_json, read_weights
from draftsmith.models.files.pretrained import name_faults, read_adapter


def merge_into_target(model: Any, folder: Path) -> Any:
    """Merge a PEFT adapter into the weights of a causal LM.

    Args:
        model: a causal LM of Transformers; it is changed.
        folder: what :func:`adapter_folder` gave.

    Returns:
        The merged model.

    Raises:
        ValueError: the adapter is of another model, broken, or of a kind that cannot be merged.
    """
    weights = read_weights(folder)
    _refuse_imports(folder)
    _part_ends(model, folder)
    try:
        adapted = read_adapter(PeftModel, model, folder)
    except (RuntimeError, ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"adapter {folder} does not fit the model; give one that was trained on it ({error})"
        ) from error
    if not hasattr(adapted.base_model, "merge_and_unload"):
        kind = adapted.active_peft_config.peft_type
        raise ValueError(f"adapter {folder} is of the kind {kind}, which cannot be merged into weights; give a LoRA")
    # PEFT only warns of these, and the target would be the model without its adapter.
    wanted = get_peft_model_state_dict(adapted, save_embedding_layers=False).keys()
    faults = {
        "missing": sorted(wanted - weights.keys()),
        "unexpected": sorted(weights.keys() - wanted - adapted.state_dict().keys()),
    }
    if any(faults.values()):
        raise ValueError(
            f"adapter {folder} does not fit the model ({name_faults(faults)}); give one that was trained on it"
        )
    return adapted.merge_and_unload()


def _refuse_imports(folder: Path) -> None:
    """PEFT imports whatever module a LoRA for Megatron names."""
    fields = read_json(folder / CONFIG)
    if fields.get("megatron_config"):
        raise ValueError(
            f"{folder / CONFIG} has megatron_config, by which PEFT would import the module {fields.get('megatron_core')!r}; "
            "set it to null, or give an adapter that was not trained with Megatron"
        )


def _part_ends(model: Any, folder: Path) -> None:
    """Gives the head a weight of its own where it shares the embedding's and the adapter is on one of the two.

    Beside the weights an adapter acts on the one layer alone; merged into a weight of both it would act on both.
    """
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    if head is None or head.weight is not embedding.weight:
        return
    ends = [name for name, module in model.named_modules() if module is embedding or module is head]
    if reaches(folder, ends):
        head.weight = nn.Parameter(head.weight.detach().clone(), requires_grad=False)
