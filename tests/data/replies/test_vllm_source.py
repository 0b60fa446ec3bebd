"""Replies from vLLM in this process, through a stand-in for the package: what it is given, and what is made of its answers."""

import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from tiny import EOS
from transformers import PreTrainedTokenizerBase

from draftsmith.data.replies.reply_settings import SamplingOverrides
from draftsmith.data.replies.reply_sources import BundledEngine, IndependentEngine, Reply
from draftsmith.data.replies.respond import respond
from draftsmith.data.replies.vllm_source import VllmEngine, VllmOptions
from draftsmith.decode.sampling import GenerationSettings, ReplyOptions
from draftsmith.models import Target
from draftsmith.models.target.options import TargetOptions

SETTINGS = GenerationSettings(max_new_tokens=6, eos_token_ids=(EOS,))


@dataclass
class Output:
    """Both of vLLM's: of a request and of its one completion."""

    token_ids: list[int] = field(default_factory=list)
    finish_reason: str = "stop"
    prompt_token_ids: list[int] = field(default_factory=list)
    outputs: list["Output"] = field(default_factory=list)


class StandIn(ModuleType):
    """What of `vllm` is used: LLM(...).generate and SamplingParams."""

    def __init__(self) -> None:
        super().__init__("vllm")
        self.built: list[dict[str, Any]] = []
        self.reply: Callable[[list[int], dict[str, Any]], Output] = lambda prompt, params: Output([7, EOS])
        outer = self

        class LLM:
            def __init__(self, **settings: Any) -> None:
                outer.built.append(settings)

            def generate(self, prompts: list[dict[str, list[int]]], params: list[Any], use_tqdm: bool) -> list[Output]:
                answers = []
                for prompt, wanted in zip(prompts, params, strict=True):
                    one = outer.reply(prompt["prompt_token_ids"], vars(wanted))
                    answers.append(Output(prompt_token_ids=prompt["prompt_token_ids"], outputs=[one]))
                return answers

        class SamplingParams:
            def __init__(self, **settings: Any) -> None:
                vars(self).update(settings)

        self.LLM, self.SamplingParams = LLM, SamplingParams


@pytest.fixture
def vllm(monkeypatch: pytest.MonkeyPatch) -> StandIn:
    standing = StandIn()
    monkeypatch.setitem(sys.modules, "vllm", standing)
    return standing


def test_it_gives_the_rows_of_the_bundled_decoder(
    vllm: StandIn, target: Path, write_jsonl: Callable[..., Path], tmp_path: Path
) -> None:
    bundled = BundledEngine(Target.load(str(target)))

    def reply(prompt: list[int], params: dict[str, Any]) -> Output:
        settings = GenerationSettings(params["max_tokens"], eos_token_ids=tuple(params["stop_token_ids"]))
        [one] = bundled.reply([prompt], settings, [0])
        return Output(one.token_ids, "length" if one.finish == "length" else "stop")

    vllm.reply = reply
    prompts = write_jsonl(
        [
            {"id": f"p{n}", "messages": [{"role": "user", "content": f"{n} apples?"}], "source": "s", "split": "train"}
            for n in range(5)
        ]
    )
    common = {
        "target": str(target),
        "prompts": prompts,
        "reply": ReplyOptions(max_new_tokens=8),
        "sampling": SamplingOverrides(temperature=0.0),
    }
    respond(out=tmp_path / "bundled", **common)  # type: ignore[arg-type]
    respond(
        out=tmp_path / "vllm", engine="vllm", vllm=VllmOptions(2, 0.5), where=TargetOptions(dtype="bfloat16"), **common
    )  # type: ignore[arg-type]
    rows = [(tmp_path / name / "responses.jsonl").read_text() for name in ("bundled", "vllm")]
    assert rows[0] == rows[1] != ""
    with pytest.raises(ValueError, match="engine: there 'vllm', now None"):
        respond(out=tmp_path / "vllm", where=TargetOptions(dtype="bfloat16"), **common)  # type: ignore[arg-type]
    [settings] = vllm.built
    assert settings == {
        "model": str(target),
        "dtype": "bfloat16",
        "tensor_parallel_size": 2,
        "gpu_memory_utilization": 0.5,
        "generation_config": "vllm",
    }


def test_each_request_has_a_seed_and_a_budget_of_its_own(
    vllm: StandIn, target: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    seen: list[dict[str, Any]] = []

    def reply(prompt: list[int], params: dict[str, Any]) -> Output:
        seen.append(params)
        return Output([9] * params["max_tokens"], "length")

    vllm.reply = reply
    engine = VllmEngine(str(target), tokenizer, context=8)
    settings = GenerationSettings(max_new_tokens=6, temperature=1.0, seed=3, eos_token_ids=(EOS,))
    assert engine.reply([[5], [5, 6, 7]], settings, [1, 2]) == [Reply([9] * 6, "length"), Reply([9] * 5, "length")]
    assert [(params["seed"], params["max_tokens"]) for params in seen] == [(3 * 2**32 + 1, 6), (3 * 2**32 + 2, 5)]
    # It batches by itself but answers lists, so it is not asked one by one.
    assert not isinstance(engine, IndependentEngine)


def test_what_it_cannot_hold_to_is_refused(vllm: StandIn, target: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    engine = VllmEngine(str(target), tokenizer)
    with pytest.raises(ValueError, match="min_p before top_p"):
        engine.reply([[5]], GenerationSettings(temperature=1.0, min_p=0.1, top_p=0.5), [1])
    vllm.reply = lambda prompt, params: Output([7, 8])
    with pytest.raises(ValueError, match="token 8, which is no end token"):
        engine.reply([[5]], SETTINGS, [1])


def test_a_prompt_that_was_changed_is_noticed(vllm: StandIn, target: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    engine = VllmEngine(str(target), tokenizer)
    engine._llm.generate = lambda prompts, params, use_tqdm: [Output(prompt_token_ids=[1, 5], outputs=[Output([EOS])])]
    with pytest.raises(ValueError, match="read 2 tokens where it was given 1"):
        engine.reply([[5]], SETTINGS, [1])


def test_without_the_package_it_says_how_to_get_it(
    monkeypatch: pytest.MonkeyPatch, target: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    monkeypatch.setitem(sys.modules, "vllm", None)
    with pytest.raises(ValueError, match=r"pip install 'vllm>=0\.30'"):
        VllmEngine(str(target), tokenizer)


def test_the_bundled_decoders_options_are_refused(target: Path, tmp_path: Path) -> None:
    for where, name in ((TargetOptions(device="cuda"), "device"), (TargetOptions(adapter="a"), "adapter")):
        with pytest.raises(ValueError, match=f"--{name} is an option of the bundled decoder"):
            respond(str(target), tmp_path / "prompts", tmp_path / "out", engine="vllm", where=where)
