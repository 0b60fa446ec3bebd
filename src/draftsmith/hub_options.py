"""What commands ask about files that may come from the Hugging Face hub.

Owns names, defaults and help of these options. Does not know what is read with them, and imports nothing heavy.
"""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class HubOptions:
    """How the files of a target are found and read.

    Args:
        revision: Revision of a hub id.
        trust_remote_code: Run Python files that come with the target, its tokenizer or a draft LM. Read them first.
    """

    revision: str | None = None
    trust_remote_code: bool = False


OWN_FILES = HubOptions()
