"""The benchmark of graphs counts what a compiler makes of a cycle."""

import pytest
import torch

from benchmarks.decode import graphs


def test_a_page_has_a_row_for_each_drafter_shape_and_temperature(monkeypatch: pytest.MonkeyPatch) -> None:
    drafters = {"plain": None, "redrafter": graphs.drafters_for(graphs.tiny_target())["redrafter"]}
    monkeypatch.setattr(graphs, "drafters_for", lambda _: drafters)
    given = ["--sections", "graphs", "--cycles", "4", "--shapes", "s1.1"]
    page = list(graphs.report(graphs.parse(given)))
    assert page[0] == f"`python -m benchmarks.decode.graphs {' '.join(given)}`"
    rows = [line for line in page if line.startswith(("| plain", "| redrafter"))]
    assert len(rows) == 2
    assert all(line.endswith("| 1 | the same |") for line in rows)


def test_shapes_are_counted_over_as_many_cycles_as_were_asked_for() -> None:
    seen: set[tuple[torch.Size, torch.Size]] = set()
    cycles = [0]
    engine = graphs.Engine(graphs.tiny_target(), runner=lambda cycle: cycle)
    with graphs.watched_attention(seen, cycles):
        engine.generate(graphs.PROMPTS, graphs.GenerationSettings(max_new_tokens=21, eos_token_ids=()))
    assert cycles[0] >= 20
    assert len(seen) == 1


def test_kernels_are_counted_in_the_code_that_inductor_writes() -> None:
    code = "    cpp_fused_mul_0(a)\n    extern_kernels.mm(a, b)\n    buf1 = torch.ops.aten.sort.stable(c)\n    del a\n"
    assert len(graphs._KERNEL.findall(code)) == 3
