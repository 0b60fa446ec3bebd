"""What pages of measurements say of their machine."""

import re

import torch

from benchmarks.machine import machine_line, machine_section
from draftsmith import provenance


def test_a_line_names_processor_cores_threads_and_torch() -> None:
    assert re.fullmatch(rf".+, \d+ cores, \d+ threads?, torch {re.escape(torch.__version__)}", machine_line())


def test_a_section_lists_every_fact_and_version() -> None:
    title, facts = machine_section().split("\n\n")
    assert title == "## The machine"
    names = [line.removeprefix("- ").partition(": ")[0] for line in facts.splitlines()]
    assert names == [*provenance.machine(), *provenance.versions()]
