"""The custom_generate layout: decoded with by Transformers alone, in a process that cannot import draftsmith."""

from __future__ import annotations

import ast
import json
import os
import re
import shutil
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from doubles import family_configs, random_model
from every_family import OUR_FAMILIES
from scipy.stats import chisquare
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, DynamicCache, LogitsProcessorList, PreTrainedModel
from transformers.generation import StoppingCriteria, StoppingCriteriaList, TemperatureLogitsWarper
from transformers.generation.streamers import BaseStreamer

from draftsmith.decode import Engine
from draftsmith.decode.hugging_face.hf_generate import generate
from draftsmith.export.export_command import export
from draftsmith.export.layouts import custom_generate
from draftsmith.export.layouts.shipped_code import PACKAGES, shipped_code
from draftsmith.models import (
    Drafter,
    DraftLimits,
    Eagle,
    Eagle3,
    Family,
    PackedBatch,
    ReDrafter,
    ShapesByRows,
    Target,
    TargetEnds,
    data_rollout,
)
from draftsmith.models.files.loading import load_tokenizer
from draftsmith.models.files.model_folder import resolve
from draftsmith.models.tree.kept_shapes import KeptShapes

KINDS: dict[str, type[Any]] = {"redrafter": ReDrafter, "eagle": Eagle, "eagle3": Eagle3}
QUESTIONS = (
    "Tom has 3 boxes with 4 pens each. How many pens does Tom have?",
    "Ann has 12 apples and eats 5 of them. How many apples are left?",
    "A bus has 30 seats and 17 are taken. How many seats are free?",
)
EOS, PAD, LONGEST, SHORT = 3, 0, 90, 7

# Everything that is asked of the folders where draftsmith cannot be imported, answered in one process.
CHILD = """
import json, sys

class Hidden:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "draftsmith":
            raise ModuleNotFoundError(f"{name} is hidden from this test")

sys.meta_path.insert(0, Hidden())
import torch
from transformers import AutoConfig, AutoModelForCausalLM

job = json.loads(open(sys.argv[1]).read())
model = AutoModelForCausalLM.from_pretrained(job["target"], dtype=torch.float32)
model.train()
forwards = 0

def count(*_):
    global forwards
    forwards += 1

model.base_model.register_forward_pre_hook(count)
told = {"greedy": {}, "short": {}, "forwards": {}, "batch": {}, "refused": {}}

def decode(folder, prompt, **settings):
    prompt = torch.tensor(prompt if isinstance(prompt[0], list) else [prompt])
    return model.generate(prompt, do_sample=False, custom_generate=folder, trust_remote_code=True, **settings).tolist()

for kind, folder in job["folders"].items():
    told["short"][kind] = decode(folder, job["prompts"][0], max_new_tokens=job["short"])[0]
    forwards = 0
    told["greedy"][kind] = [decode(folder, job["prompts"][0], max_new_tokens=job["longest"])[0]]
    told["forwards"][kind] = forwards
    told["greedy"][kind] += [decode(folder, prompt, max_new_tokens=job["longest"])[0] for prompt in job["prompts"][1:]]
    mask = torch.tensor(job["mask"])
    told["batch"][kind] = decode(folder, job["padded"], max_new_tokens=job["longest"], attention_mask=mask)
loaded = model.load_custom_generate(job["folders"]["eagle"], trust_remote_code=True)
prompt = torch.tensor([job["prompts"][0]])
told["loaded"] = loaded(model, prompt, drafter=job["folders"]["eagle"], do_sample=False, max_new_tokens=job["short"])[0].tolist()
told["hub"] = decode("someone/a-drafter.v1", job["prompts"][0], max_new_tokens=job["longest"])[0]
told["still_training"] = model.training and all(parameter.requires_grad for parameter in model.parameters())
for name, other in job["others"].items():
    other = AutoModelForCausalLM.from_pretrained(other, dtype=torch.float32)
    try:
        other.generate(torch.tensor([[5, 6]]), custom_generate=job["folders"]["eagle"], trust_remote_code=True, max_new_tokens=4)
        told["refused"][name] = ""
    except ValueError as error:
        told["refused"][name] = str(error)
told["half"] = []
half = AutoModelForCausalLM.from_pretrained(job["target"], dtype=torch.bfloat16)
for folder in job["folders"].values():
    told["half"].append(half.generate(prompt, custom_generate=folder, trust_remote_code=True, max_new_tokens=4).shape[1])
for kind in job["model_types"]:
    try:
        AutoConfig.for_model(kind)
        told["registered"] = kind
    except ValueError:
        told.setdefault("registered", "")
told["modules"] = sorted(sys.modules)
print("TOLD" + json.dumps(told))
"""


@pytest.fixture(scope="module")
def target() -> Target:
    return Target.load("embedded:target")


@pytest.fixture(scope="module")
def prompts() -> list[list[int]]:
    tokenizer = load_tokenizer("embedded:target")
    chats = [[{"role": "user", "content": question}] for question in QUESTIONS]
    return [list(tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=False)) for chat in chats]


@pytest.fixture(scope="module")
def plain(target: Target, prompts: list[list[int]]) -> list[list[int]]:
    """What the model says by itself."""
    return [
        target.model.generate(torch.tensor([prompt]), do_sample=False, max_new_tokens=LONGEST)[0].tolist()
        for prompt in prompts
    ]


def taught(drafter: Any, target: Target, texts: list[list[int]], prompts: list[list[int]]) -> Drafter:
    """A drafter that has seen these very texts often enough to guess them."""
    states = [target.prefix(torch.tensor([text]), layers=drafter.features) for text in texts]
    batch = PackedBatch(
        input_ids=torch.tensor([token for text in texts for token in text]),
        loss_mask=torch.cat(
            [torch.arange(len(text)) >= len(prompt) for text, prompt in zip(texts, prompts, strict=True)]
        ),
        document_ids=torch.tensor([number for number, text in enumerate(texts) for _ in text]),
        positions=torch.cat([torch.arange(len(text)) for text in texts]),
        hidden={name: torch.cat([one.feature(name)[0] for one in states]).clone() for name in drafter.features},
    )
    rollout = data_rollout(batch, 3)
    optimizer = torch.optim.AdamW([one for one in drafter.parameters() if one.requires_grad], lr=2e-3)
    for _ in range(40):
        logits = drafter.teacher_forced(batch, rollout) @ drafter.head_weight.T
        loss = F.cross_entropy(logits[rollout.valid.T], rollout.targets.T[rollout.valid.T])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return drafter.eval()


@pytest.fixture(scope="module")
def folders(
    tmp_path_factory: pytest.TempPathFactory, target: Target, prompts: list[list[int]], plain: list[list[int]]
) -> dict[str, Path]:
    """Drafters of every family in the layout, taught the first text, so that they guess it well and the others less so."""
    found = {}
    for name, family in KINDS.items():
        torch.manual_seed(0)
        drafter = taught(family.for_target(target.ends), target, plain[:1], prompts[:1])
        found[name] = tmp_path_factory.mktemp("folders") / name
        found[name].mkdir()
        custom_generate.write(drafter, found[name], target.ends)
    return found


@pytest.fixture(scope="module")
def others(tmp_path_factory: pytest.TempPathFactory, target: Target) -> dict[str, str]:
    """Models that the drafters were not made for: of another size, and of the same with other weights."""
    found = {name: tmp_path_factory.mktemp(name) for name in ("small", "alike")}
    random_model(family_configs()["llama"]).save_pretrained(found["small"])
    random_model(target.model.config, seed=5).save_pretrained(found["alike"])
    return {name: str(folder) for name, folder in found.items()}


@pytest.fixture(scope="module")
def told(
    tmp_path_factory: pytest.TempPathFactory,
    folders: dict[str, Path],
    others: dict[str, str],
    prompts: list[list[int]],
) -> dict[str, Any]:
    """What the child process answers."""
    place = tmp_path_factory.mktemp("child")
    width = max(map(len, prompts))
    job = {
        "target": str(resolve("embedded:target")),
        "folders": {name: str(folder) for name, folder in folders.items()},
        "prompts": prompts,
        "padded": [[PAD] * (width - len(prompt)) + prompt for prompt in prompts],
        "mask": [[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts],
        "longest": LONGEST,
        "short": SHORT,
        "others": others,
        "model_types": [family.config.model_type for family in OUR_FAMILIES],
    }
    (place / "job.json").write_text(json.dumps(job))
    cached_repository(place / "hub", "someone/a-drafter.v1", folders["eagle3"])
    environment = os.environ | {
        "HF_HUB_OFFLINE": "1",
        "HF_HUB_CACHE": str(place / "hub"),
        "HF_MODULES_CACHE": str(place / "modules"),
        "OMP_NUM_THREADS": "1",
    }
    done = subprocess.run(
        [sys.executable, "-c", CHILD, str(place / "job.json")],
        cwd=place,
        capture_output=True,
        text=True,
        env=environment,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.partition("TOLD")[2])


def cached_repository(hub: Path, name: str, files: Path) -> None:
    """A folder as the hub's client keeps it after a download."""
    commit, kept = "c0ffee" * 6 + "c0ff", hub / ("models--" + name.replace("/", "--"))
    (kept / "refs").mkdir(parents=True)
    (kept / "refs" / "main").write_text(commit)
    (kept / "snapshots").mkdir()
    (kept / "snapshots" / commit).symlink_to(files, target_is_directory=True)


def test_greedy_output_is_what_the_model_gives_by_itself(
    told: dict[str, Any], plain: list[list[int]], prompts: list[list[int]]
) -> None:
    assert all(
        text[-1] == EOS and len(text) < len(prompt) + LONGEST for text, prompt in zip(plain, prompts, strict=True)
    )
    for kind in KINDS:
        assert told["greedy"][kind] == plain
        assert told["short"][kind] == plain[0][: len(prompts[0]) + SHORT]


def test_drafters_that_guess_well_save_forwards(
    told: dict[str, Any], plain: list[list[int]], prompts: list[list[int]]
) -> None:
    num_tokens = len(plain[0]) - len(prompts[0])
    for kind in KINDS:
        assert told["forwards"][kind] < num_tokens / 2, kind


def test_padded_rows_give_what_they_give_alone(
    told: dict[str, Any], plain: list[list[int]], prompts: list[list[int]]
) -> None:
    assert len(set(map(len, prompts))) > 1
    replies = [text[len(prompt) :] for text, prompt in zip(plain, prompts, strict=True)]
    longest, width = max(map(len, replies)), max(map(len, prompts))
    for kind in KINDS:
        for row, prompt, reply in zip(told["batch"][kind], prompts, replies, strict=True):
            assert row == [PAD] * (width - len(prompt)) + prompt + reply + [PAD] * (longest - len(reply))


def test_the_function_can_be_loaded_once_and_called(
    told: dict[str, Any], plain: list[list[int]], prompts: list[list[int]]
) -> None:
    assert told["loaded"] == plain[0][: len(prompts[0]) + SHORT]


def test_a_folder_of_the_hub_is_found_by_its_name(told: dict[str, Any], plain: list[list[int]]) -> None:
    assert told["hub"] == plain[0]


def test_a_target_in_half_precision_is_still_known(told: dict[str, Any], prompts: list[list[int]]) -> None:
    assert told["half"] == [len(prompts[0]) + 4] * len(KINDS)


def test_other_targets_are_refused(told: dict[str, Any]) -> None:
    assert "expects hidden size 192" in told["refused"]["small"]
    assert re.search(
        r"was made for target 'embedded:target'.*other weights \(embedding\.weight", told["refused"]["alike"]
    )


def test_the_process_knows_neither_draftsmith_nor_our_model_types(told: dict[str, Any]) -> None:
    assert not [name for name in told["modules"] if name.split(".")[0] in ("draftsmith", "peft", "pytorch_lightning")]
    assert told["registered"] == ""


def test_the_model_is_as_trainable_as_before(told: dict[str, Any]) -> None:
    assert told["still_training"]


def test_what_a_config_forbids_or_demands_is_done_as_the_model_does_it_alone(
    model: PreTrainedModel, folders: dict[str, Path], prompts: list[list[int]], plain: list[list[int]]
) -> None:
    prompt, reply = prompts[0], plain[0][len(prompts[0]) :]
    asked: dict[str, Any] = {
        "suppress_tokens": reply[1:2],
        "no_repeat_ngram_size": 2,
        "min_length": len(prompt) + 7,
        "renormalize_logits": True,
    }
    alone = model.generate(torch.tensor([prompt]), do_sample=False, max_new_tokens=8, **asked)[0].tolist()
    assert decode(model, folders["redrafter"], prompt, max_new_tokens=8, **asked) == alone
    assert alone[len(prompt) :] != reply[:8]


# ---- what is shipped -----------------------------------------------------------------------------------------------


def definitions(text: str) -> dict[str, str]:
    """Functions, classes' members and constants at the top of a module, by name, as syntax; imports do not count."""
    found = {}
    for node in ast.parse(text).body:
        for part in node.body if isinstance(node, ast.ClassDef) else [node]:
            owner = f"{node.name}." if isinstance(node, ast.ClassDef) else ""
            if isinstance(part, ast.FunctionDef):
                found[owner + part.name] = ast.dump(part)
            elif isinstance(part, ast.Assign | ast.AnnAssign):
                found[owner + ast.unparse(part).split("=")[0]] = ast.dump(part)
    return found


@pytest.mark.parametrize("family", OUR_FAMILIES, ids=lambda family: family.name)
def test_shipped_code_is_the_code_that_is_tested_here(family: Family) -> None:
    left_out = set()
    modules = shipped_code(family.drafter).modules
    del modules["models_drafters_registry"]  # written for this family
    for text in modules.values():
        module = re.match(r"# From draftsmith \S+, module draftsmith\.(\S+)\. SPDX", text)
        assert module is not None
        spec = find_spec(f"draftsmith.{module[1]}")
        assert spec is not None
        assert spec.origin is not None
        source = definitions(Path(spec.origin).read_text(encoding="utf-8"))
        shipped = definitions(text)
        assert shipped.items() <= source.items(), module[1]
        left_out |= {name.strip() for name in source.keys() - shipped.keys() if not name.startswith("_")}
    above = [other for other in OUR_FAMILIES if issubclass(family.drafter, other.drafter)]
    settings = {other.settings.__name__ for other in above}
    of_settings = {name for name in left_out if name.split(".")[0] in settings}
    record = {"FAMILY"} if family.settings.__module__ == family.drafter.__module__ else set()  # else nothing imports it
    assert left_out - of_settings == {"Target.load", "TargetEnds.load", "read_end_tokens", *record}


@pytest.mark.parametrize("family", OUR_FAMILIES, ids=lambda family: family.name)
def test_shipped_code_imports_transformers_and_what_comes_with_it(family: Family) -> None:
    modules = shipped_code(family.drafter).modules
    for name, text in modules.items():
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.ImportFrom) and node.level:
                assert node.level == 1, name
                assert node.module in modules, name
                continue
            named = []
            if isinstance(node, ast.Import):
                named = [one.name for one in node.names]
            elif isinstance(node, ast.ImportFrom):
                named = [str(node.module)]
            packages = {one.split(".")[0] for one in named} - set(sys.stdlib_module_names)
            assert packages <= set(PACKAGES), name


@pytest.mark.parametrize("family", OUR_FAMILIES, ids=lambda family: family.name)
def test_a_folder_holds_the_code_of_its_own_family_alone(family: Family) -> None:
    modules = shipped_code(family.drafter).modules
    others = {other.drafter.__module__ for other in OUR_FAMILIES if not issubclass(family.drafter, other.drafter)}
    assert family.drafter.__module__.removeprefix("draftsmith.").replace(".", "_") in modules
    assert not {other.removeprefix("draftsmith.").replace(".", "_") for other in others} & set(modules)


def test_the_folder_is_also_one_in_our_own_layout(folders: dict[str, Path], target: Target) -> None:
    from draftsmith.export.layouts.layouts import load_any

    for name, folder in folders.items():
        assert type(load_any(folder, target.ends)) is KINDS[name]


def test_without_a_target_nothing_is_written(tmp_path: Path, target: Target) -> None:
    with pytest.raises(ValueError, match="add --target"):
        custom_generate.write(ReDrafter.for_target(target.ends), tmp_path, None)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_the_cards_example_runs(tmp_path: Path, folders: dict[str, Path]) -> None:
    export(folders["redrafter"], tmp_path / "out", target="embedded:target", layout="custom_generate")
    (code,) = re.findall(r"```python\n(.*?)```", (tmp_path / "out" / "README.md").read_text(), re.DOTALL)
    assert "draftsmith" not in code.replace(str(resolve("embedded:target")), "")
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "HF_MODULES_CACHE": str(tmp_path), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path / "out", capture_output=True, text=True, env=environment
    )
    assert done.returncode == 0, done.stderr
    assert "pens" in done.stdout


def test_an_earlier_export_in_this_layout_is_replaced(tmp_path: Path, folders: dict[str, Path]) -> None:
    for _ in range(2):
        export(folders["eagle"], tmp_path / "out", target="embedded:target", layout="custom_generate")
    assert (tmp_path / "out" / "custom_generate" / "generate.py").is_file()


# ---- the function itself, in this process --------------------------------------------------------------------------


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(resolve("embedded:target"), dtype=torch.float32)


def decode(model: PreTrainedModel, folder: Path, prompt: list[int], **settings: Any) -> list[int]:
    chosen = {"do_sample": False, "max_new_tokens": LONGEST} | settings
    return generate(model, torch.tensor([prompt]), drafter=str(folder), **chosen)[0].tolist()


def test_a_penalty_is_applied_as_transformers_does(
    model: PreTrainedModel, folders: dict[str, Path], prompts: list[list[int]], plain: list[list[int]]
) -> None:
    settings: dict[str, Any] = {"do_sample": False, "max_new_tokens": LONGEST, "repetition_penalty": 2.5}
    expected = model.generate(torch.tensor(prompts[:1]), **settings)[0].tolist()
    assert expected != plain[0]
    assert decode(model, folders["eagle"], prompts[0], repetition_penalty=2.5) == expected


def test_max_length_counts_the_prompt(
    tiny: tuple[PreTrainedModel, Path],
) -> None:
    model, folder = tiny
    prompt = torch.tensor([[1, 4, 2]])
    found = generate(model, prompt, drafter=folder, do_sample=False, max_length=9)
    assert found.shape == (1, 9)
    assert torch.equal(found, model.generate(prompt, do_sample=False, max_length=9))


class Heard(BaseStreamer):
    def __init__(self) -> None:
        self.parts: list[list[int]] = []
        self.ended = False

    def put(self, value: torch.Tensor) -> None:
        self.parts.append(value.flatten().tolist())

    def end(self) -> None:
        self.ended = True


def test_a_streamer_hears_the_prompt_and_then_token_by_token(
    model: PreTrainedModel, folders: dict[str, Path], prompts: list[list[int]], plain: list[list[int]]
) -> None:
    expected, heard = Heard(), Heard()
    model.generate(torch.tensor(prompts[:1]), do_sample=False, max_new_tokens=LONGEST, streamer=expected)
    decode(model, folders["redrafter"], prompts[0], streamer=heard)
    assert heard.parts == expected.parts
    assert heard.ended


def test_a_call_can_say_how_much_to_draft(
    model: PreTrainedModel, folders: dict[str, Path], prompts: list[list[int]], plain: list[list[int]]
) -> None:
    widths: list[int] = []
    handle = model.base_model.register_forward_pre_hook(
        lambda _module, _inputs, named: widths.append(named["input_ids"].shape[1]), with_kwargs=True
    )
    for settings, widest in (({}, 12), ({"node_budget": None, "beam_width": 1, "draft_length": 2}, 3)):
        widths.clear()
        assert decode(model, folders["eagle3"], prompts[0], **settings) == plain[0]
        assert max(widths[1:]) == widest
    handle.remove()


def test_attention_that_changes_between_calls_is_noticed(
    folders: dict[str, Path], prompts: list[list[int]], plain: list[list[int]]
) -> None:
    model = AutoModelForCausalLM.from_pretrained(resolve("embedded:target"), dtype=torch.float32)
    for attention in ("sdpa", "eager"):
        model.set_attn_implementation(attention)
        assert decode(model, folders["eagle"], prompts[0]) == plain[0]


def test_a_drafter_that_is_exported_anew_is_read_anew(
    tmp_path: Path, target: Target, model: PreTrainedModel, prompts: list[list[int]], plain: list[list[int]]
) -> None:
    custom_generate.write(ReDrafter.for_target(target.ends), tmp_path, target.ends)
    decode(model, tmp_path, prompts[0], max_new_tokens=SHORT)
    (tmp_path / "model.safetensors").write_bytes(b"")
    with pytest.raises(Exception, match="header"):
        decode(model, tmp_path, prompts[0], max_new_tokens=SHORT)


@pytest.mark.parametrize(
    ("settings", "complaint"),
    [
        ({"num_beams": 2}, "generation mode 'beam_search'"),
        ({"prompt_lookup_num_tokens": 3}, "generation mode 'assisted_generation'"),
        ({"return_dict_in_generate": True, "output_scores": True}, "output_scores: only token ids are returned"),
        ({"output_hidden_states": True}, "output_hidden_states: only token ids are returned"),
        ({"past_key_values": DynamicCache()}, "past_key_values: not supported"),
        ({"cache_implementation": "quantized"}, "cache_implementation is 'quantized'"),
        ({"stop_strings": ["."]}, "tokenizer"),
        ({"logits_processor": LogitsProcessorList([TemperatureLogitsWarper(0.5)])}, "logits_processor: not supported"),
        ({"position_ids": torch.arange(3)}, "position_ids: not supported"),
        ({"synced_gpus": True}, "synced_gpus: not supported"),
        ({"colour": "red"}, "colour"),
        ({"beam_width": 0}, "beam_width is 0"),
    ],
)
def test_what_cannot_be_done_is_refused(
    model: PreTrainedModel, folders: dict[str, Path], settings: dict[str, Any], complaint: str
) -> None:
    with pytest.raises(ValueError, match=re.escape(complaint)):
        decode(model, folders["redrafter"], [5, 6, 7], **settings)


def test_a_streamer_shows_one_row_only(model: PreTrainedModel, folders: dict[str, Path]) -> None:
    with pytest.raises(ValueError, match="but 2 rows are asked for"):
        generate(model, torch.tensor([[5, 6], [7, 8]]), drafter=folders["eagle"], streamer=Heard())


def test_stop_strings_end_a_reply_where_transformers_ends_it(
    folders: dict[str, Path], prompts: list[list[int]], plain: list[list[int]]
) -> None:
    model = AutoModelForCausalLM.from_pretrained(resolve("embedded:target"), dtype=torch.float32)
    tokenizer = load_tokenizer("embedded:target")
    reply = tokenizer.decode(plain[0][len(prompts[0]) :])
    settings: dict[str, Any] = {"stop_strings": [reply[len(reply) // 2 :][:3]], "tokenizer": tokenizer}
    expected = model.generate(torch.tensor(prompts[:1]), do_sample=False, max_new_tokens=LONGEST, **settings)[
        0
    ].tolist()
    assert len(prompts[0]) < len(expected) < len(plain[0])
    assert decode(model, folders["redrafter"], prompts[0], **settings) == expected
    model.generation_config.stop_strings = settings["stop_strings"]
    assert decode(model, folders["redrafter"], prompts[0], tokenizer=tokenizer) == expected


class AfterSum(StoppingCriteria):
    """Ends a row once the ids behind its first `start` sum up to a multiple of 11; says so for each row."""

    def __init__(self, start: int) -> None:
        self.start = start

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        assert scores is None
        return input_ids[:, self.start :].sum(1) % 11 == 0


def test_a_stopping_criterion_of_the_caller_ends_each_row_where_transformers_ends_it(
    model: PreTrainedModel, folders: dict[str, Path], prompts: list[list[int]]
) -> None:
    width = max(map(len, prompts))
    padded = torch.tensor([[PAD] * (width - len(prompt)) + prompt for prompt in prompts])
    settings: dict[str, Any] = {
        "attention_mask": (torch.arange(width) >= torch.tensor([[width - len(prompt)] for prompt in prompts])).long(),
        "stopping_criteria": StoppingCriteriaList([AfterSum(width)]),
        "do_sample": False,
        "max_new_tokens": LONGEST,
    }
    expected = model.generate(padded, **settings)
    assert len({int((row != PAD).sum()) for row in expected[:, width:]}) > 1
    heard = generate(model, padded, drafter=folders["eagle"], **settings)
    assert heard.tolist() == expected.tolist()


def test_max_time_ends_a_reply_that_has_more_to_say(
    model: PreTrainedModel, folders: dict[str, Path], prompts: list[list[int]]
) -> None:
    assert len(decode(model, folders["eagle"], prompts[0], max_time=1e-9)) == len(prompts[0]) + 1


def test_sequences_come_in_a_record_where_that_is_asked_for(
    model: PreTrainedModel, folders: dict[str, Path], prompts: list[list[int]], plain: list[list[int]]
) -> None:
    found = generate(
        model,
        torch.tensor(prompts[:1]),
        drafter=folders["eagle"],
        do_sample=False,
        max_new_tokens=LONGEST,
        return_dict_in_generate=True,
    )
    assert found.sequences.tolist() == plain[:1]
    assert list(found) == ["sequences"]


def test_outside_of_a_call_of_generate_the_folder_must_be_named(model: PreTrainedModel) -> None:
    with pytest.raises(ValueError, match="say so with drafter="):
        generate(model, torch.tensor([[5, 6]]))


def test_a_folder_without_a_drafter_is_refused(tmp_path: Path, model: PreTrainedModel) -> None:
    with pytest.raises(ValueError, match="is no drafter that"):
        decode(model, tmp_path, [5, 6])


def test_a_drafter_that_lacks_a_tensor_is_refused(tmp_path: Path, target: Target, model: PreTrainedModel) -> None:
    from safetensors.torch import load_file, save_file

    custom_generate.write(ReDrafter.for_target(target.ends), tmp_path, target.ends)
    tensors = load_file(tmp_path / "model.safetensors")
    del tensors["rnn_u.weight"]
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"rnn_u\.weight"):
        decode(model, tmp_path, [5, 6])


# ---- sampling ------------------------------------------------------------------------------------------------------

VOCAB, ROWS, DRAWN = 7, 4000, 3


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> tuple[PreTrainedModel, Path]:
    """A model of seven tokens and a drafter of it."""
    config = family_configs()["llama"]
    config.vocab_size = VOCAB
    config.eos_token_id = None
    model = random_model(config, seed=3)
    folder = tmp_path_factory.mktemp("tiny")
    torch.manual_seed(1)
    ends = TargetEnds(model, "tiny", "")
    custom_generate.write(Eagle.for_target(ends), folder, ends)
    return model, folder


@torch.no_grad()
def law_of_three(model: PreTrainedModel, prompt: list[int], temperature: float, top_k: int) -> torch.Tensor:
    """[V, V, V]: probabilities of the next three tokens, by enumeration."""
    law = torch.ones(())
    texts = torch.tensor([prompt])
    for _ in range(DRAWN):
        logits = model(input_ids=texts).logits[:, -1].double() / temperature
        logits[logits < logits.topk(top_k).values[:, -1:]] = -torch.inf
        law = (law.reshape(-1, 1) * logits.softmax(-1)).flatten()
        texts = torch.cat([texts.repeat_interleave(VOCAB, 0), torch.arange(VOCAB).repeat(len(texts))[:, None]], dim=1)
    return law.reshape(VOCAB, VOCAB, VOCAB)


def test_samples_have_the_models_distribution(tiny: tuple[PreTrainedModel, Path]) -> None:
    model, folder = tiny
    torch.manual_seed(0)
    settings = {"do_sample": True, "temperature": 0.8, "top_k": 5, "max_new_tokens": DRAWN}
    found = generate(model, torch.tensor([[1, 4, 2]]).expand(ROWS, -1), drafter=folder, **settings)
    law = law_of_three(model, [1, 4, 2], 0.8, 5)
    seen = Counter(map(tuple, found[:, 3:].tolist()))
    assert all(law[triple] > 0 for triple in seen)
    expected = law.flatten() * ROWS
    counts = torch.tensor([seen[tuple(triple)] for triple in torch.cartesian_prod(*[torch.arange(VOCAB)] * 3).tolist()])
    often = expected >= 5
    merged_seen = [*counts[often].tolist(), int(counts[~often].sum())]
    merged_law = [*expected[often].tolist(), float(expected[~often].sum())]
    assert len(merged_law) > 20
    assert chisquare(merged_seen, merged_law).pvalue > 1e-3


@pytest.mark.parametrize("family", KINDS.values())
def test_a_draft_vocabulary_is_shipped_too(
    tmp_path: Path, tiny: tuple[PreTrainedModel, Path], family: type[Any]
) -> None:
    model, _ = tiny
    ends = TargetEnds(model, "tiny", "")
    drafter = family.for_target(ends, draft_token_ids=torch.tensor([1, 4, 6]), tokenizer_fingerprint="any")
    custom_generate.write(drafter, tmp_path, ends)
    prompt = torch.tensor([[1, 4, 2]])
    found = generate(model, prompt, drafter=tmp_path, do_sample=False, max_new_tokens=30)
    assert torch.equal(found, model.generate(prompt, do_sample=False, max_new_tokens=30))


def test_torchs_seed_decides_the_sample(tiny: tuple[PreTrainedModel, Path]) -> None:
    model, folder = tiny
    prompt, texts = torch.tensor([[1, 4, 2]]), []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        texts.append(generate(model, prompt, drafter=folder, do_sample=True, max_new_tokens=30).tolist())
    assert texts[0] == texts[1] != texts[2]


def test_shapes_that_tune_kept_are_drafted_where_a_call_says_nothing(
    tmp_path: Path,
    model: PreTrainedModel,
    folders: dict[str, Path],
    prompts: list[list[int]],
    plain: list[list[int]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked: list[Any] = []

    class Watched(Engine):
        def __init__(self, target: Target, drafter: Drafter, limits: Any) -> None:
            asked.append(limits)
            super().__init__(target, drafter, limits)

    monkeypatch.setattr("draftsmith.decode.hugging_face.hf_generate.Engine", Watched)
    folder, shapes = tmp_path / "kept", ShapesByRows(((1, DraftLimits(2, 3)), (4, None)))
    shutil.copytree(folders["eagle"], folder)
    decode(model, folder, prompts[0], max_new_tokens=2)
    kept = KeptShapes(shapes, (1, 4), "embedded:target", "", "cpu", "a processor", "float32")
    kept.write(folder)
    assert decode(model, folder, prompts[0]) == plain[0]
    decode(model, folder, prompts[0], max_new_tokens=2, draft_length=2)
    replace(kept, device="cuda").write(folder)
    with pytest.warns(UserWarning, match="is not used"):
        decode(model, folder, prompts[0], max_new_tokens=2)
    assert [isinstance(limits, ShapesByRows) for limits in asked] == [False, True, False, False]
    assert asked[1] == shapes
