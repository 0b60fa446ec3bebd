"""How a download from the Hugging Face hub shows: one line that it begins, and in a terminal a bar of its bytes.

Owns the bar that is handed to the hub's client, because commands switch off all bars of libraries. Does not know what is downloaded.
"""

from __future__ import annotations

import logging
from typing import Any

from huggingface_hub import try_to_load_from_cache
from tqdm.auto import tqdm

_LOG = logging.getLogger(__name__)


class DownloadBar(tqdm):
    """Shows the bytes that arrive, in a terminal only; the hub's other bars (files, reconstruction) stay hidden."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        counts_bytes = str(kwargs.get("desc", "")).startswith("Downloading")
        # None hides the bar where stderr is no terminal. The delay hides it where everything is in the cache already.
        super().__init__(*args, **(kwargs | {"disable": None if counts_bytes else True, "delay": 1.0, "leave": False}))


def announce_download(repository: str, revision: str | None) -> None:
    """Log a line if a model or adapter of the hub is not in the cache yet.

    Args:
        repository: the hub id.
        revision: the hub's revision.
    """
    for name in ("config.json", "adapter_config.json"):
        if isinstance(try_to_load_from_cache(repository, name, revision=revision), str):
            return
    _LOG.info("downloading %s from the Hugging Face hub", repository)
