"""The one command, `draftsmith`: which function each subcommand is, and how it reports a failure.

Owns names and exit codes: 0 done, 1 the data or a file is at fault, 2 the command line or its YAML is. Knows nothing
of what the subcommands do, and imports one only when it is called, so that `draftsmith --help` needs no torch.
"""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from draftsmith import __version__
from draftsmith.escapes import visible
from draftsmith.quiet import quiet_libraries

PROG = "draftsmith"


@dataclass(frozen=True)
class Command:
    """One subcommand: where its function is, and what it does in a line.

    `reads_arguments` marks a function that takes the list of arguments itself instead of parsed values. `help` is the module whose
    `early_answer` gives help for such a function without importing it.
    """

    module: str
    function: str
    summary: str
    reads_arguments: bool = False
    help: str | None = None

    def outline(self) -> Callable[..., Any]:
        """The function, or where its module is not imported yet, one of the same signature: what parsing needs."""
        if self.module in sys.modules:
            return self.load()
        from draftsmith.outline import outline

        return outline(self.module, self.function)

    def load(self) -> Callable[..., Any]:
        """Imports the function."""
        function: Callable[..., Any] = getattr(importlib.import_module(self.module), self.function)
        return function


GROUPS = {
    "embedded": "The small world that ships with the package: word problems and a target that solves them.",
    "data": "From prompts to the target's own replies to cached hidden states.",
    "judge": "A judge lets correct draft tokens stand that are not the target's own. LOSSY, with its price measured.",
    "label": "Answers with the place of their first error: bring them in, count them, take them out.",
}
COMMANDS: dict[tuple[str, ...], Command] = {
    ("embedded", "prompts"): Command(
        "draftsmith.embedded", "write_prompts", "Write word problems of the sums corpus as prompts."
    ),
    ("embedded", "build"): Command(
        "draftsmith.train.embedded_lm.build", "build", "Train the embedded target and draft LM from scratch."
    ),
    ("embedded", "accuracy"): Command(
        "draftsmith.embedded.accuracy", "accuracy", "Count how many problems an embedded model solves."
    ),
    ("data", "prompts"): Command(
        "draftsmith.data.prompts", "prompts", "Read prompts from files or the hub; detect, dedupe and split them."
    ),
    ("data", "respond"): Command(
        "draftsmith.data.replies.respond", "respond", "Let the target answer the prompts itself."
    ),
    ("data", "extract"): Command(
        "draftsmith.data.cache.extract", "extract", "Cache the target's hidden states over its replies."
    ),
    ("data", "verify"): Command(
        "draftsmith.data.cache.verify_cache",
        "verify",
        "Check a cache: checksums, and samples run through the target again.",
    ),
    ("data", "ngrams"): Command(
        "draftsmith.data.replies.ngrams_command",
        "ngrams",
        "Count the n-grams of replies, to score drafts a second time.",
    ),
    ("data", "pool"): Command(
        "draftsmith.data.replies.pool_command",
        "pool",
        "Keep text of replies that drafts without training may repeat to anybody.",
    ),
    ("data", "show"): Command(
        "draftsmith.data.cache.show", "show", "Print samples with the tokens no loss is taken on dimmed."
    ),
    ("label", "import"): Command(
        "draftsmith.label.commands.store_commands",
        "import_answers",
        "Add labelled answers, of any known format, to a store.",
    ),
    ("label", "generate"): Command(
        "draftsmith.label.commands.generate_command",
        "generate",
        "Let models answer questions, check every answer, keep them labelled.",
    ),
    ("label", "corrupt"): Command(
        "draftsmith.label.corrupt.corrupt_command",
        "corrupt",
        "Put errors of known places into right answers: more kinds than one draft LM makes.",
    ),
    ("label", "export"): Command(
        "draftsmith.label.commands.store_commands",
        "export_answers",
        "Write a store's answers and labels as JSON lines or for Label Studio.",
    ),
    ("label", "serve"): Command(
        "draftsmith.label.page.serve_command",
        "serve",
        "Serve the page on which people mark the first error of each answer.",
    ),
    ("label", "stats"): Command(
        "draftsmith.label.commands.store_commands", "stats", "Count a store's answers, labels and labelled tokens."
    ),
    ("label", "rows"): Command(
        "draftsmith.label.commands.rows_command",
        "rows",
        "Write labelled answers as token rows of a target: a judge's training set.",
    ),
    ("label", "mine"): Command(
        "draftsmith.label.mine.mine_command",
        "mine",
        "Find out which of a draft LM's tokens leave the target's answer as it is.",
    ),
    ("train",): Command(
        "draftsmith.train.cli",
        "main",
        "Train from a YAML file: train fit --config FILE (Lightning's own CLI).",
        reads_arguments=True,
        help="draftsmith.train.help",
    ),
    ("export",): Command(
        "draftsmith.export.export_command", "export", "Write a trained drafter as safetensors, with its card."
    ),
    ("inspect",): Command(
        "draftsmith.export.inspect_command", "inspect", "Tell what a drafter's folder holds, whoever wrote it."
    ),
    ("judge", "export"): Command(
        "draftsmith.export.judge.export_command",
        "export_judge",
        "Write a trained judge as safetensors, with its card. Lossy.",
    ),
    ("judge", "evaluate"): Command(
        "draftsmith.evaluate.lossy.lossy_command",
        "evaluate_rules",
        "Measure what lossy rules gain, and what they cost in right answers.",
    ),
    ("judge", "rounds"): Command(
        "draftsmith.train.judge.rounds_command",
        "judge_rounds",
        "Let a judge learn from what it lets stand: decode, check, train, round by round.",
    ),
    ("judge", "tune"): Command(
        "draftsmith.evaluate.lossy.tune_command",
        "tune_judge",
        "Choose a judge's threshold and gate by the answers that they give. Lossy.",
    ),
    ("decode",): Command(
        "draftsmith.decode.decode_command", "decode", "Decode with a drafter and show what was accepted."
    ),
    ("evaluate",): Command(
        "draftsmith.evaluate.evaluate_command", "evaluate", "Measure exactness, acceptance and speed; write a report."
    ),
    ("tune",): Command(
        "draftsmith.evaluate.tune.tune_command", "tune", "Find the draft shape that is fastest on this machine."
    ),
    ("doctor",): Command(
        "draftsmith.evaluate.doctor.doctor_command",
        "doctor",
        "Tell why a drafter's acceptance is low: states, labels, text, training, export.",
    ),
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs `draftsmith ARGUMENTS` (those of the process when None) and gives the exit code."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    if words[:1] == ["--version"]:
        print(f"{PROG} {__version__}")
        return 0
    if not words or words[0] in ("-h", "--help"):
        print(overview())
        return 0
    if words[0] in GROUPS and (len(words) == 1 or words[1] in ("-h", "--help")):
        print(overview(words[0]))
        return 0
    name = tuple(words[:2]) if words[0] in GROUPS else (words[0],)
    if name not in COMMANDS:
        return _unknown(name)
    return _run(name, words[len(name) :])


def overview(group: str | None = None) -> str:
    """The list of subcommands, or of those in one group."""
    lines = [
        f"usage: {' '.join(filter(None, [PROG, group]))} COMMAND [options]",
        "",
        GROUPS[group] if group else "Train draft heads for speculative decoding, prove them lossless, and export them.",
        "",
        "commands, in the order of the work:",
    ]
    chosen = {name: command for name, command in COMMANDS.items() if group is None or name[0] == group}
    width = max(len(" ".join(name)) for name in chosen)
    lines += [f"  {' '.join(name):<{width}}  {command.summary}" for name, command in chosen.items()]
    lines += ["", f"'{PROG} COMMAND --help' lists the options of a command; --config FILE reads them from YAML."]
    return "\n".join(lines if group else [*lines, f"'{PROG} --version' prints the version."])


def _unknown(name: tuple[str, ...]) -> int:
    from draftsmith.arguments import suggestion

    known = {" ".join(command) for command in COMMANDS} | set(GROUPS)
    word = " ".join(name)
    print(f"{PROG}: error: unknown command '{visible(word)}'.{suggestion(word, known)}", file=sys.stderr)
    print(f"Run '{PROG} --help' to see every command.", file=sys.stderr)
    return 2


def _run(name: tuple[str, ...], arguments: list[str]) -> int:
    command = COMMANDS[name]
    prog = " ".join([PROG, *name])
    try:
        if command.reads_arguments:
            from draftsmith.arguments import check_config_files

            code = _early_answer(command, arguments)
            if code is not None:
                return code
            check_config_files(prog, _with_base_files(command, arguments))
            with quiet_libraries():
                command.load()(arguments)
        else:
            from draftsmith.arguments import call_parsed, parse

            parsed = parse(command.outline(), prog, arguments)
            with quiet_libraries():
                call_parsed(command.load(), prog, parsed)
    except BrokenPipeError:
        # The reader (`| head`) has left; what Python still holds for it must not raise again at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except (ValueError, OSError) as error:
        print(f"{prog}: error: {visible(error)}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f"\n{prog}: interrupted; repeat the command to resume it, where that is possible", file=sys.stderr)
        return 130
    return 0


def _with_base_files(command: Command, arguments: list[str]) -> list[str]:
    """The arguments with every configuration file that will be read, by its name of today."""
    if command.help is None:
        return arguments
    words: list[str] = importlib.import_module(command.help).with_base_files(arguments)
    return words


def _early_answer(command: Command, arguments: list[str]) -> int | None:
    """The exit code where help or a mistake is answered without the command itself, else None."""
    if command.help is None:
        return None
    code: int | None = importlib.import_module(command.help).early_answer(arguments)
    return code


if __name__ == "__main__":
    sys.exit(main())
