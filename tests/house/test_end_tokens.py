"""What ends a reply has one reader, so that masks, drawing and export cannot disagree."""

import ast
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
OWNER = "models/files/end_tokens.py"
# Not the model's end tokens: the criterion of one call to transformers' generate.
ALLOWED = {("decode/hugging_face/hf_request.py", "criterion")}
NAMES = {"eos_token_id", "eos_token"}


def readers(tree: ast.AST) -> Iterator[str]:
    """What `eos_token_id` is read of: the object of an attribute, or the whole call or subscript that names it in a string."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and node.attr in NAMES and isinstance(node.ctx, ast.Load):
            yield ast.unparse(node.value)
        elif isinstance(node, ast.Subscript) or _is_lookup(node):
            parts = node.args if isinstance(node, ast.Call) else [node.slice]  # type: ignore[attr-defined]
            if any(isinstance(part, ast.Constant) and part.value in NAMES for part in parts):
                yield ast.unparse(node)


def _is_lookup(node: ast.AST) -> bool:
    return isinstance(node, ast.Call) and ast.unparse(node.func).split(".")[-1] in ("getattr", "get", "pop")


def sources() -> Iterator[Path]:
    for folder in ("src", "models", "decode", "data", "label", "train", "evaluate", "export", "embedded", "benchmarks"):
        yield from (ROOT / folder).rglob("*.py")


def test_only_one_module_reads_which_tokens_end_a_reply() -> None:
    found = {
        (str(path.relative_to(ROOT)), read)
        for path in sources()
        for read in readers(ast.parse(path.read_text(encoding="utf-8")))
    }
    assert {one for one in found if one[0] != OWNER} == ALLOWED


def test_every_way_to_read_them_is_seen() -> None:
    ways = (
        "config.eos_token_id",
        "getattr(config, 'eos_token_id', None)",
        "row['eos_token_id']",
        "row.get('eos_token_id')",
    )
    for way in ways:
        assert list(readers(ast.parse(f"found = {way}"))), way
    assert not list(readers(ast.parse("generate(eos_token_id=3)")))
