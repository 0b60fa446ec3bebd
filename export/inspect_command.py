"""`draftsmith inspect`: what lies in a drafter's folder, whoever wrote it, and whether it fits a target.

Owns what is printed and in which order. Does not know how a folder is described or read.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from draftsmith.arguments import FLAT
from draftsmith.escapes import one_line
from draftsmith.export.contents import Contents, contents_of
from draftsmith.models.drafters.drafter_folder import drafter_folder, load_drafter
from draftsmith.models.drafters.other_layouts import TargetBond
from draftsmith.models.files.fingerprint import tokenizer_fingerprint
from draftsmith.models.target.options import EndsOptions

OWN_ENDS = EndsOptions()


def inspect(drafter: str, target: str | None = None, where: Annotated[EndsOptions, FLAT] = OWN_ENDS) -> None:
    """Print what a drafter's folder holds: the kind, whose layout, sizes, draft vocabulary, target.

    It knows draftsmith's folders and those of vLLM, SGLang, SafeAILab, the speculators package, Apple, z-lab, Medusa and fms-extras. It
    never opens pickled weights. With --target, it also reads the drafter as every other command does, and checks that it is whole and fits.

    Args:
        drafter: Folder or hub id of a drafter, of an adapter of one, or of a causal LM.
        target: Directory or hub id of the target that the drafter should fit, or embedded:target.
        where: Which target is meant; see `EndsOptions`.

    Raises:
        ValueError: nothing here is known, the weights are pickled, or the drafter is not whole or not for this target.
    """
    folder = drafter_folder(drafter)
    contents = contents_of(folder)
    print(_text(folder, contents))
    if not contents.decodes:
        print(f"draftsmith names the kind {contents.kind} and does not decode it yet")
        return
    if target is None:
        if contents.needs_target:
            print("the folder is not bound to a target: add --target to check that it is whole and fits")
        return
    bond = TargetBond(where.load_ends(target), tokenizer_fingerprint(where.tokenizer(target)))
    loaded = load_drafter(folder, trust_remote_code=where.trust_remote_code, target=bond)
    loaded.attach(bond.ends)
    loaded.check_tokenizer(bond.tokenizer_fingerprint)
    print(f"whole, and fits {one_line(target)}; `draftsmith evaluate --drafters {one_line(drafter)}` measures it")


def _text(folder: Path, contents: Contents) -> str:
    """The lines on a folder, values in one column."""
    lines = [("folder", str(folder)), ("kind", contents.kind), ("layout", contents.layout), *contents.facts]
    width = max(len(name) for name, _ in lines)
    return "\n".join(f"{name:<{width}}  {one_line(value)}" for name, value in lines)
