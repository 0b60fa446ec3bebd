"""Fields that somebody else wrote: one that names a file stays inside its folder."""

import pytest

from draftsmith.models.files.field_rules import safe_file_name


@pytest.mark.parametrize("value", ["", ".", "..", ".hidden", "a/b", "/a", "a\\b", "a b", "a\0", "x" * 300, 7, None])
def test_a_plain_file_name_stays_in_its_folder(value: object) -> None:
    assert safe_file_name("model-00001-of-00002.safetensors", "here") == "model-00001-of-00002.safetensors"
    with pytest.raises(ValueError, match=r"index.json: the file of x is .*, which is no plain file name"):
        safe_file_name(value, "index.json: the file of x")
