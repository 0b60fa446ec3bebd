"""Writers killed at random moments: what counts is whole after every kill, and the next run leaves no stray file."""

import json
import subprocess
import sys
from typing import Any

import pytest
import writers


@pytest.fixture(scope="module")
def campaigns(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """What 25 kills of each kind of writer came to. Fails where anything that counts was not whole after one of them."""
    command = [sys.executable, writers.__file__, str(tmp_path_factory.mktemp("kills")), "11", "25"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=500, check=False)
    assert done.returncode == 0, done.stderr
    found: dict[str, dict[str, Any]] = json.loads(done.stdout)
    return found


@pytest.mark.parametrize("kind", writers.KINDS)
def test_a_writer_killed_at_any_moment_leaves_nothing_half_that_counts_and_the_next_run_no_stray_file(
    campaigns: dict[str, dict[str, Any]], kind: str
) -> None:
    assert campaigns[kind]["half"] > 0, "no kill met a writer at work: the campaign shows nothing"
    assert (campaigns[kind]["status"], campaigns[kind]["strays"]) == (0, [])
