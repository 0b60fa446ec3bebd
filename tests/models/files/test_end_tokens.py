import json
from pathlib import Path

import pytest
from tiny import EOS, make_tokenizer
from transformers import GenerationConfig, LlamaConfig

from draftsmith.models.files.end_tokens import end_tokens, read_end_tokens
from draftsmith.models.target.ends import TargetEnds
from draftsmith.models.target.target import Target


def config(ids: object) -> LlamaConfig:
    made = LlamaConfig(vocab_size=300)
    made.eos_token_id = ids
    return made


@pytest.mark.parametrize(
    ("generation", "model", "expected"),
    [
        ([7, 9, 7], 3, (7, 9)),
        (7, 3, (7,)),
        (None, 3, (3,)),
        ([], [3, 5], (3, 5)),
        (None, None, (EOS,)),
        ([], [], (EOS,)),
    ],
)
def test_the_generation_config_comes_first_then_the_config_then_the_tokenizer(
    generation: object, model: object, expected: tuple[int, ...]
) -> None:
    own = GenerationConfig()
    own.eos_token_id = generation
    assert end_tokens(own, config(model), make_tokenizer()) == expected
    assert end_tokens() == ()


def test_ids_outside_the_vocabulary_are_left_out_aloud() -> None:
    own = GenerationConfig()
    own.eos_token_id = [9, 300, -1]
    with pytest.warns(UserWarning, match=r"generation config names the end tokens \[-1, 300\].*300 tokens"):
        assert end_tokens(own, config(3)) == (9,)
    own.eos_token_id = 300
    with pytest.warns(UserWarning, match="generation config"):
        assert end_tokens(own, config(3)) == (3,)


@pytest.mark.parametrize("named", ["</s>", [2, "3"], 2.0, True])
def test_what_is_no_token_id_is_refused(named: object) -> None:
    own = GenerationConfig()
    own.eos_token_id = named
    with pytest.raises(ValueError, match=r"the generation config has eos_token_id .* a list of token ids"):
        end_tokens(own)


def test_a_saved_model_its_ends_and_its_folder_give_one_answer(target: Path, tmp_path: Path) -> None:
    for file in target.iterdir():
        if file.name != "generation_config.json":
            (tmp_path / file.name).symlink_to(file)
    for generation, model, expected in ((None, None, (EOS,)), (None, 6, (6,)), ([7, EOS], 6, (7, EOS))):
        settings = json.loads((target / "config.json").read_text()) | {"eos_token_id": model}
        (tmp_path / "config.json").unlink()
        (tmp_path / "config.json").write_text(json.dumps(settings))
        (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": generation}))
        assert read_end_tokens(str(tmp_path)) == expected
        assert TargetEnds.load(str(tmp_path)).eos_token_ids == expected
        assert Target.load(str(tmp_path)).eos_token_ids == expected
