"""What the comparison with vLLM makes of two engines' replies; vLLM itself is not needed."""

import json
from dataclasses import asdict

import pytest

from benchmarks.export.vllm_conformity import RESULT
from benchmarks.export.vllm_decoding import Compared, Decoded, named_folder, page, result_of

OURS = Decoded([[5, 6, 7], [8, 9]], 2)


def text(theirs: Decoded) -> str:
    return page("embedded:target", 4, [Compared("eagle", "runs/served", OURS, theirs)], ["script", "--limit", "2"])


def test_equal_replies_and_cycles_agree() -> None:
    assert Compared("eagle", "runs/served", OURS, Decoded([[5, 6, 7], [8, 9]], 2)).agrees
    assert "| `eagle` | `runs/served` | 2 of 2 | 5 | 1.50 | 2 | 2 |" in text(OURS)
    assert "differ" not in text(OURS)
    assert "`python -m benchmarks.export.vllm_decoding --limit 2`" in text(OURS)


def test_the_first_difference_is_named() -> None:
    theirs = Decoded([[5, 6, 7], [8, 3]], 2)
    assert not Compared("eagle", "runs/served", OURS, theirs).agrees
    assert "| 1 of 2 |" in text(theirs)
    assert "reply 1 differs from token 1 on" in text(theirs)
    assert "reply 1 differs from token 2 on" in text(Decoded([[5, 6, 7], [8, 9, 4]], 2))
    assert "the numbers of cycles differ" in text(Decoded(OURS.replies, 3))


def test_a_result_is_read_among_other_lines_and_may_be_missing() -> None:
    assert result_of(f"INFO loading\n{RESULT}{json.dumps(asdict(OURS))}\nbye\n") == OURS
    assert result_of("INFO loading\nkilled\n") is None


def test_a_folder_needs_its_method() -> None:
    assert named_folder("eagle3=runs/a=b") == ("eagle3", "runs/a=b")
    with pytest.raises(SystemExit, match="names no method of vLLM; write eagle=runs/served"):
        named_folder("runs/served")
