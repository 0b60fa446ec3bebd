"""Kinds of drafters that are known by name: each by the config of its publishers, and no ordinary model is taken for one."""

import pytest

from draftsmith.models.other_software.named_kinds import named_kind


@pytest.mark.parametrize(
    ("fields", "tensors", "kind"),
    [
        ({"architectures": ["DFlashDraftModel"], "model_type": "qwen3"}, (), "DFlash"),
        ({"model_type": "qwen3", "dflash_config": {}}, (), "DFlash"),
        ({"architectures": ["DFlash2DraftModel"], "dflash_config": {}}, (), "DFlash 2"),
        ({"architectures": ["Qwen3DSparkModel"], "dflash_config": {}}, (), "DSpark"),
        ({"speculators_model_type": "peagle"}, (), "P-EAGLE"),
        ({"architectures": ["LlamaForCausalLMEagle3"]}, ("fc.weight", "norm.weight", "mask_hidden"), "P-EAGLE"),
        ({"medusa_num_heads": 4, "base_model_name_or_path": "org/name"}, (), "Medusa"),
        ({"model_type": "mlp_speculator"}, (), "MLP speculator"),
        ({"architectures": ["LlamaForCausalLM"], "model_type": "llama"}, ("norm.weight",), ""),
        ({"architectures": "DFlashDraftModel", "speculators_model_type": ["dflash"]}, (), ""),
        ({}, (), ""),
    ],
)
def test_a_kind_is_named_by_what_its_publishers_write(fields: dict, tensors: tuple, kind: str) -> None:
    assert named_kind(fields, tensors) == kind
