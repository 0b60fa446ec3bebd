"""Exact-answer accuracy of a model on sums problems, greedy: ``python -m draftsmith.embedded.accuracy --model target``.

Owns batched greedy answering and counting. Plain ``transformers`` generation, so that it does not depend on this
project's decoder.
"""

from dataclasses import dataclass
from pathlib import Path

import torch
from jsonargparse import auto_cli
from transformers import LlamaForCausalLM, PreTrainedTokenizerBase

from draftsmith.embedded import path
from draftsmith.embedded.checker import Verdict, check
from draftsmith.embedded.problems import Problem, Split, distinct_problems
from draftsmith.escapes import visible
from draftsmith.models.files.pretrained import read_model, read_tokenizer


@dataclass(frozen=True)
class Accuracy:
    """How many of ``problems`` were answered rightly, and in how many every line was right as well."""

    problems: int
    right_answers: int
    flawless: int

    @property
    def share(self) -> float:
        return self.right_answers / self.problems


def accuracy(
    model: str = "target",
    problems: int = 500,
    split: Split = "test",
    seed: int = 0,
    batch_size: int = 50,
    show: int = 0,
) -> Accuracy:
    """Answers sums problems greedily in fp32 and prints the share of right answers.

    Args:
        model: target, draft_lm, or a model directory.
        problems: How many distinct problems.
        split: Which split they come from.
        seed: Which problems of the split.
        batch_size: Problems answered at once.
        show: How many wrong replies to print.

    Raises:
        ValueError: `problems` is below 1.
    """
    if problems < 1:
        raise ValueError(f"problems is {problems}, at least 1 is needed; raise it")
    directory = path(model) if model in ("target", "draft_lm") else Path(model)  # type: ignore[arg-type]
    words = read_tokenizer(directory)
    lm = read_model(LlamaForCausalLM, directory, dtype=torch.float32).eval()
    asked = distinct_problems(split, problems, seed)
    replies: list[str] = []
    for start in range(0, len(asked), batch_size):
        replies += reply(lm, words, [problem.question for problem in asked[start : start + batch_size]])
    verdicts = [check(problem, text) for problem, text in zip(asked, replies, strict=True)]
    _show_wrong(asked, replies, verdicts, show)
    right = sum(verdict.correct for verdict in verdicts)
    flawless = sum(verdict.correct and verdict.error_span is None for verdict in verdicts)
    result = Accuracy(len(asked), right, flawless)
    print(
        f"{model}: {right} of {len(asked)} {split} problems right ({result.share:.1%}), {flawless} without a wrong step"
    )
    return result


def reply(
    lm: LlamaForCausalLM, words: PreTrainedTokenizerBase, questions: list[str], started: list[str] | None = None
) -> list[str]:
    """Greedy replies to questions; with ``started``, replies that continue these beginnings (and include them)."""
    beginnings = [""] * len(questions) if started is None else started
    prompts = [
        str(
            words.apply_chat_template(
                [{"role": "user", "content": question}], tokenize=False, add_generation_prompt=True
            )
        )
        + beginning
        for question, beginning in zip(questions, beginnings, strict=True)
    ]
    batch = words(prompts, return_tensors="pt", padding=True, padding_side="left")
    with torch.inference_mode():
        output = lm.generate(  # type: ignore[misc, operator, unused-ignore]
            input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], do_sample=False, max_new_tokens=160
        )
    continued = words.batch_decode(output[:, batch["input_ids"].shape[1] :], skip_special_tokens=True)
    return [beginning + rest for beginning, rest in zip(beginnings, continued, strict=True)]


def _show_wrong(asked: list[Problem], replies: list[str], verdicts: list[Verdict], show: int) -> None:
    wrong = [index for index, verdict in enumerate(verdicts) if not verdict.correct]
    for index in wrong[:show]:
        print(visible(f"{asked[index].question}\n{replies[index]}\n(right: {asked[index].answer})\n"))


if __name__ == "__main__":
    auto_cli(accuracy, as_positional=False)
