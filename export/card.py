"""The model card: what the drafter is, how it is used, what was measured, how it was made.

Owns the text. Every figure in it comes from a report or a provenance record that is handed in; where
nothing was recorded, it states that. Does not know how to read or write weights.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from draftsmith.escapes import block, code, plain, yaml_text
from draftsmith.export.layouts import custom_generate
from draftsmith.export.layouts.layout import Layout
from draftsmith.models.drafters.drafter_config import DrafterConfig
from draftsmith.models.drafters.family import Family
from draftsmith.models.drafters.registry import registry
from draftsmith.models.target.target import PRE_NORM
from draftsmith.models.tree.shapes import is_sampled

QUESTION = "Tom has 3 boxes with 4 pens each. How many pens does Tom have?"
UNKNOWN_TARGET = "path/or/hub-id/of/the/target"


@dataclass(frozen=True)
class Subject:
    """What a card speaks of.

    Attributes:
        family: its family.
        config: the drafter's.
        features: names of the target's layers that it reads.
        parameters: number of them.
        dtype: of the weights.
        layout: what the folder is in.
        has_template: whether the target's tokenizer has a chat template; None where the target was not at hand.
        eos_token_ids: what ends the target's replies, as far as known.
        notes: what a user must know of this layout of this drafter.
        most_steps: the deepest draft that it can make; None for any depth.
    """

    family: Family
    config: DrafterConfig
    features: tuple[str, ...]
    parameters: int
    dtype: str
    layout: Layout
    has_template: bool | None = None
    eos_token_ids: tuple[int, ...] = ()
    notes: tuple[str, ...] = ()
    most_steps: int | None = None

    @property
    def target(self) -> str:
        """The target's name as far as one was recorded."""
        return self.config.target_name or UNKNOWN_TARGET

    @property
    def chain(self) -> int:
        """The tokens that an engine is to draft in a chain: those of training, and at least 3 where the drafter can."""
        wanted = max(3, self.config.num_draft_steps)
        return wanted if self.most_steps is None else min(wanted, self.most_steps)

    @property
    def draft_vocab_size(self) -> int | None:
        """Vd as this folder has it; None for the whole vocabulary, which some layouts always have in engines."""
        size = None if self.layout.whole_vocabulary else self.config.draft_vocab_size
        return None if size is None or size >= self.config.vocab_size else size


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
        f"# {subject.family.about.with_article} draft head for {plain(name)}",
        _summary(subject),
        "## Use",
        _use(subject),
        *_serve(subject),
        "## Measured",
        _measured(rows, report),
        "## Training",
        _training(training),
        "## Files",
        _files(subject),
    ]
    return "\n\n".join(parts) + "\n"


def _front_matter(subject: Subject) -> str:
    lines = [
        "---",
        "library_name: draftsmith",
        f"tags: [speculative-decoding, draft-head, {subject.family.name}]",
    ]
    target = subject.config.target_name
    if target.count("/") == 1 and not target.startswith((".", "/")) and not Path(target).exists():
        lines.append(f"base_model: {yaml_text(target)}")
    return "\n".join([*lines, "---"])


def _summary(subject: Subject) -> str:
    config, about = subject.config, subject.family.about
    vocabulary = (
        f"the target's whole vocabulary of {config.vocab_size:,}"
        if subject.draft_vocab_size is None
        else f"a draft vocabulary of {subject.draft_vocab_size:,} of the target's {config.vocab_size:,} tokens"
    )
    layers = "" if subject.features == (PRE_NORM,) else f" ({', '.join(map(code, subject.features))})"
    return (
        f"{about.what} of {subject.parameters:,} parameters ({subject.dtype}) over {vocabulary}. It proposes tokens from {about.reads} of "
        f"{code(subject.target)}{layers}, and that target verifies them: the output is the target's own, token for token at temperature "
        f"0 and in distribution above it. It is bound to that target (fingerprint {code(config.target_fingerprint[:12] or 'unknown')}) "
        "and works with no other."
    )


def _use(subject: Subject) -> str:
    if subject.layout.name == custom_generate.FOLDER:
        program = custom_generate.example(subject.target, QUESTION, bool(subject.has_template))
        return f"Needs `torch` and `transformers` only. In this folder:\n\n```python\n{program}```"
    return f"Needs {_needed(subject.family)}. In this folder:\n\n```python\n" + example(subject) + "```"


def _needed(family: Family) -> str:
    """What must be installed, in words: a family that is not the package's own comes with another."""
    module = family.drafter.__module__
    distribution = registry().distribution(family.config.model_type)
    install = "python -m pip install draftsmith"
    if distribution:
        return code(f"{install} {distribution}")
    if module.startswith("draftsmith."):
        return code(install)
    return (
        f"{code(install)}, and the module {code(module)}, which holds the record of its family: import it, and call {code('register')} "
        f"of {code('draftsmith.models')} with the record"
    )


def _serve(subject: Subject) -> list[str]:
    commands = subject.layout.commands
    text = "" if commands is None else commands(subject.target, subject.chain)
    if not text and not subject.notes:
        return []
    where_measured = [text, "No figure on this page is from one of these engines."] if text else []
    return ["## Serve", *where_measured, *subject.notes]


def example(subject: Subject) -> str:
    """A program that decodes one prompt with the drafter in the current folder."""
    ours = subject.layout.name == "draftsmith"
    imports = "from pathlib import Path\n\nfrom draftsmith.decode import Engine, GenerationSettings\n"
    imports += "from draftsmith.decode.model_settings import for_target\n"
    imports += "" if ours else "from draftsmith.export.layouts.layouts import load_any\n"
    imports += "from draftsmith.models import Target, load_tokenizer\n"
    imports += "from draftsmith.models.drafters.drafter_folder import load_drafter\n" if ours else ""
    load = 'load_drafter(Path("."))' if ours else 'load_any(Path("."), target.ends)'
    if subject.has_template:
        prompt = f'messages = [{{"role": "user", "content": {json.dumps(QUESTION)}}}]\n'
        prompt += "prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)"
    else:
        prompt = f"prompt = tokenizer.encode({json.dumps(QUESTION)})"
    ends = f", eos_token_ids={subject.eos_token_ids}" if subject.eos_token_ids else ""
    target = json.dumps(subject.target)
    return (
        f"{imports}\n"
        f"target, tokenizer = Target.load({target}), load_tokenizer({target})\n"
        f"drafter = {load}  # this folder\n"
        "engine = Engine(target, drafter, tokenizer=tokenizer)  # refuses any other target\n\n"
        f"{prompt}\n"
        "# with what the target's generation config forbids or demands\n"
        f"settings = for_target(GenerationSettings(max_new_tokens=64{ends}), target, tells_text=True)\n"
        "reply = engine.generate([prompt], settings)[0]\n"
        "print(tokenizer.decode(reply.token_ids, skip_special_tokens=True))\n"
        'print(f"{len(reply.token_ids)} tokens in {1 + len(reply.accepted)} target forwards")\n'
    )


def _measured(rows: Sequence[Mapping[str, Any]], report: Mapping[str, Any]) -> str:
    if not rows:
        return "Not measured with these weights when this card was written. `draftsmith evaluate` measures them."
    head = "| shape | T | tokens per step | speed-up over plain | identical replies | prompts |"
    lines = [head, "|---|---|---|---|---|---|", *(_measured_line(row) for row in rows)]
    machine = report.get("machine", {})
    place = ", ".join(str(machine[key]) for key in ("cpu", "gpus") if machine.get(key)) or "an unnamed machine"
    first = rows[0]
    note = (
        f"Target {code(first['target'])}, {plain(first['dtype'])}, batch {plain(first['batch_size'])}, on {plain(place)}. *Shape*: as "
        "`draftsmith evaluate --shapes` reads it. *Tokens per step*: emitted tokens per target forward after the "
        "prefill, the bonus token counted, "
        "with the 95 % bootstrap interval over prompts. *Speed-up*: over plain decoding in the same engine."
    )
    return "\n".join(lines) + f"\n\n{note}\n\nMeasured by\n\n{block(report.get('command', ''), 'sh')}"


def _measured_line(row: Mapping[str, Any]) -> str:
    interval = row.get("tokens_per_step_interval")
    steps = "-" if row["tokens_per_step"] is None else f"{row['tokens_per_step']:.2f}"
    steps += f" ({interval[0]:.2f} to {interval[1]:.2f})" if interval else ""
    suspicious = " (suspicious)" if row.get("suspicious") else ""
    # 99.96 % must not be printed as all
    share = "all" if row["exact_share"] >= 1 else f"{min(100 * row['exact_share'], 99.9):.1f} %"
    shape = row.get("shape") or f"{row['beam_width']}x{row['draft_length']}"  # older reports name no shape
    if is_sampled(shape):  # sampled trees have the target's distribution, not plain decoding's tokens
        share = "in distribution"
    return (
        f"| {plain(shape)} | {row['temperature']:g} | {steps} "
        f"| {row['speedup']:.2f}{suspicious} | {share} | {row['prompts']} |"
    )


def _training(training: Mapping[str, Any]) -> str:
    if not training:
        return "How these weights were trained was not recorded."
    lines = [block(training.get("command", "not recorded"), "sh"), ""]
    data = dict(training.get("config", {}).get("data", {}))
    lines += [f"- data: {plain(_facts(data))}"] if data else []
    lines += [f"- read: {code(path)} ({code(print_[:12])})" for path, print_ in training.get("inputs", {}).items()]
    revision = training.get("git_revision")
    lines += [f"- code: revision {code(revision)}"] if revision else []
    lines += [f"- with: {plain(_facts(training.get('versions', {})))}"]
    lines += [f"- on: {plain(training.get('time', 'a day not recorded'))}"]
    settings = {key: value for key, value in training.get("config", {}).items() if key != "data"}
    text = json.dumps(settings, indent=2)
    return "\n".join([*lines, "", "<details><summary>Settings</summary>", "", block(text, "json"), "", "</details>"])


def _facts(facts: Mapping[str, Any]) -> str:
    return ", ".join(f"{key} {value}" for key, value in facts.items())


def _files(subject: Subject) -> str:
    return (
        f"This is {subject.layout.what}. Names, shapes and dtypes were checked against a strict table before writing and after reading "
        "back, and the logits of what was read back equal those of what was trained bit for bit. `provenance.json` says what "
        "made this folder."
    )
