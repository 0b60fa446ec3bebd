"""The model card: what the drafter is, how it is used, what was measured, how it was made.

Owns the text. Every figure in it comes from a report or a provenance record that is handed in; what was not recorded
is said to be not recorded. Does not know how to read or write weights.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from draftsmith.models.redrafter import ReDrafterConfig

QUESTION = "Tom has 3 boxes with 4 pens each. How many pens does Tom have?"
UNKNOWN_TARGET = "path/or/hub-id/of/the/target"


@dataclass(frozen=True)
class Subject:
    """What a card speaks of.

    Attributes:
        config: the drafter's.
        parameters: number of them.
        dtype: of the weights.
        layout: draftsmith or apple.
        has_template: whether the target's tokenizer has a chat template; None where the target was not at hand.
        eos_token_ids: what ends the target's replies, as far as known.
    """

    config: ReDrafterConfig
    parameters: int
    dtype: str
    layout: str
    has_template: bool | None = None
    eos_token_ids: tuple[int, ...] = ()

    @property
    def target(self) -> str:
        """The target's name as far as one was recorded."""
        return self.config.target_name or UNKNOWN_TARGET


def write_card(
    subject: Subject, rows: Sequence[Mapping[str, Any]], report: Mapping[str, Any], training: Mapping[str, Any]
) -> str:
    """The text of README.md.

    Args:
        subject: the drafter.
        rows: rows of a report measured with these very weights; none says that nothing was measured.
        report: the report's command, machine and versions.
        training: the provenance record of the training run; empty where there is none.
    """
    name = Path(subject.target).name if subject.target != UNKNOWN_TARGET else "its target"
    parts = [
        _front_matter(subject),
        f"# A ReDrafter draft head for {name}",
        _summary(subject),
        "## Use",
        _use(subject),
        "## Measured",
        _measured(rows, report),
        "## Training",
        _training(training),
        "## Files",
        _files(subject),
    ]
    return "\n\n".join(parts) + "\n"


def _front_matter(subject: Subject) -> str:
    lines = ["---", "library_name: draftsmith", "tags: [speculative-decoding, draft-head, redrafter]"]
    target = subject.config.target_name
    if target.count("/") == 1 and not target.startswith((".", "/")) and not Path(target).exists():
        lines.append(f"base_model: {target}")
    return "\n".join([*lines, "---"])


def _summary(subject: Subject) -> str:
    config = subject.config
    vocabulary = (
        f"the target's whole vocabulary of {config.vocab_size:,}"
        if config.draft_vocab_size in (None, config.vocab_size)
        else f"a draft vocabulary of {config.draft_vocab_size:,} of the target's {config.vocab_size:,} tokens"
    )
    return (
        f"A recurrent draft head ([ReDrafter](https://arxiv.org/abs/2403.09919)) of {subject.parameters:,} parameters "
        f"({subject.dtype}) over {vocabulary}. It proposes tokens from the last hidden state of `{subject.target}`, "
        "and that target verifies them: the output is the target's own, token for token at temperature 0 and in "
        f"distribution above it. It is bound to that target (fingerprint `{config.target_fingerprint[:12] or 'unknown'}`) "
        "and works with no other."
    )


def _use(subject: Subject) -> str:
    return "Needs `pip install draftsmith`. In this folder:\n\n```python\n" + example(subject) + "```"


def example(subject: Subject) -> str:
    """A program that decodes one prompt with the drafter in the current folder."""
    if subject.layout == "apple":
        imports = "from pathlib import Path\n\nfrom draftsmith.decode import Engine, GenerationSettings\n"
        imports += "from draftsmith.export.redrafter import load_apple\n"
        load = 'drafter = load_apple(Path("."), target.ends)  # this folder'
    else:
        imports = "from draftsmith.decode import Engine, GenerationSettings\n"
        imports += "from draftsmith.models.redrafter import ReDrafter\n"
        load = 'drafter = ReDrafter.from_pretrained(".")  # this folder'
    if subject.has_template:
        prompt = f'messages = [{{"role": "user", "content": {json.dumps(QUESTION)}}}]\n'
        prompt += "prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)"
    else:
        prompt = f"prompt = tokenizer.encode({json.dumps(QUESTION)})"
    ends = f", eos_token_ids={subject.eos_token_ids}" if subject.eos_token_ids else ""
    target = json.dumps(subject.target)
    return (
        f"{imports}from draftsmith.models.target import Target, load_tokenizer\n\n"
        f"target, tokenizer = Target.load({target}), load_tokenizer({target})\n"
        f"{load}\n"
        "engine = Engine(target, drafter, tokenizer=tokenizer)  # refuses any other target\n\n"
        f"{prompt}\n"
        f"reply = engine.generate([prompt], GenerationSettings(max_new_tokens=64{ends}))[0]\n"
        "print(tokenizer.decode(reply.token_ids, skip_special_tokens=True))\n"
        'print(f"{len(reply.token_ids)} tokens in {1 + len(reply.accepted)} target forwards")\n'
    )


def _measured(rows: Sequence[Mapping[str, Any]], report: Mapping[str, Any]) -> str:
    if not rows:
        return "Not measured with these weights when this card was written. `draftsmith evaluate` measures them."
    head = "| beam | T | tokens per step | speed-up over plain | identical replies | prompts |"
    lines = [head, "|---|---|---|---|---|---|", *(_measured_line(row) for row in rows)]
    machine = report.get("machine", {})
    place = ", ".join(str(machine[key]) for key in ("cpu", "gpus") if machine.get(key)) or "an unnamed machine"
    first = rows[0]
    note = (
        f"Target `{first['target']}`, {first['dtype']}, batch {first['batch_size']}, on {place}. *Beam*: width x "
        "drafted tokens. *Tokens per step*: emitted tokens per target forward after the prefill, the bonus token counted, "
        "with the 95 % bootstrap interval over prompts. *Speed-up*: over plain decoding in the same engine."
    )
    return "\n".join(lines) + f"\n\n{note}\n\nMeasured by\n\n```sh\n{report.get('command', '')}\n```"


def _measured_line(row: Mapping[str, Any]) -> str:
    interval = row.get("tokens_per_step_interval")
    steps = "-" if row["tokens_per_step"] is None else f"{row['tokens_per_step']:.2f}"
    steps += f" ({interval[0]:.2f} to {interval[1]:.2f})" if interval else ""
    suspicious = " (suspicious)" if row.get("suspicious") else ""
    # 99.96 % must not be printed as all
    share = "all" if row["exact_share"] >= 1 else f"{min(100 * row['exact_share'], 99.9):.1f} %"
    return (
        f"| {row['beam_width']}x{row['draft_length']} | {row['temperature']:g} | {steps} "
        f"| {row['speedup']:.2f}{suspicious} | {share} | {row['prompts']} |"
    )


def _training(training: Mapping[str, Any]) -> str:
    if not training:
        return "How these weights were trained was not recorded."
    lines = [f"```sh\n{training.get('command', 'not recorded')}\n```", ""]
    data = dict(training.get("config", {}).get("data", {}))
    lines += [f"- data: {_facts(data)}"] if data else []
    lines += [f"- read: `{path}` (`{print_[:12]}`)" for path, print_ in training.get("inputs", {}).items()]
    revision = training.get("git_revision")
    lines += [f"- code: revision `{revision}`"] if revision else []
    lines += [f"- with: {_facts(training.get('versions', {}))}", f"- on: {training.get('time', 'a day not recorded')}"]
    settings = {key: value for key, value in training.get("config", {}).items() if key != "data"}
    text = json.dumps(settings, indent=2)
    return "\n".join(
        [*lines, "", "<details><summary>Settings</summary>", "", f"```json\n{text}\n```", "", "</details>"]
    )


def _facts(facts: Mapping[str, Any]) -> str:
    return ", ".join(f"{key} {value}" for key, value in facts.items())


def _files(subject: Subject) -> str:
    whose = {
        "draftsmith": "draftsmith's layout: `config.json` names the target, `model.safetensors` the tensors",
        "apple": "the layout of Apple's ml-recurrent-drafter: `config.json` with its keys only, `model.safetensors` "
        "with its tensor names. The target is named in `provenance.json`",
    }[subject.layout]
    return (
        f"This is {whose}. Names, shapes and dtypes were held to a strict table before writing and after reading back, "
        "and the logits of what was read back equal those of what was trained bit for bit. `provenance.json` says what "
        "made this folder."
    )
