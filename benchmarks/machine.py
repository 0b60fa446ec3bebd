"""What a page says of the machine that measured it: one line, or a section with all facts and versions."""

from __future__ import annotations

import torch

from draftsmith import provenance


def machine_line() -> str:
    """Processor, cores, threads of this process and the version of torch; the beginning of a sentence."""
    machine, threads = provenance.machine(), torch.get_num_threads()
    plural = "" if threads == 1 else "s"
    return f"{machine['cpu']}, {machine['cores']} cores, {threads} thread{plural}, torch {torch.__version__}"


def machine_section() -> str:
    """A section of a page: a list of the machine's facts and of the versions of what a result depends on."""
    facts = {**provenance.machine(), **provenance.versions()}
    return "\n\n".join(["## The machine", "\n".join(f"- {name}: {value}" for name, value in facts.items())])
