"""What a download from the hub shows."""

import io
import logging

import pytest

from draftsmith.models.files import hub_download
from draftsmith.models.files.hub_download import DownloadBar, announce_download


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize(
    ("desc", "stream", "hidden"),
    [
        ("Downloading bytes", Terminal(), False),
        ("Downloading bytes", io.StringIO(), True),
        ("Fetching 3 files", Terminal(), True),
        ("Reconstructing (incomplete total...)", Terminal(), True),
    ],
)
def test_only_the_bytes_are_shown_and_only_in_a_terminal(desc: str, stream: io.StringIO, hidden: bool) -> None:
    with DownloadBar(desc=desc, total=0, initial=0, unit="B", unit_scale=True, file=stream) as bar:
        assert bool(bar.disable) is hidden
        bar.total = 100
        bar.update(10)
    assert stream.getvalue() == "", "nothing in the first second: all may be in the cache"


@pytest.mark.parametrize("cached", ["config.json", "adapter_config.json", None])
def test_a_download_is_announced_unless_the_model_is_in_the_cache(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, cached: str | None
) -> None:
    def look_up(repository: str, name: str, revision: str | None) -> str | None:
        assert (repository, revision) == ("org/name", "v1")
        return f"/cache/{name}" if name == cached else None

    monkeypatch.setattr(hub_download, "try_to_load_from_cache", look_up)
    with caplog.at_level(logging.INFO):
        announce_download("org/name", "v1")
    assert ("downloading org/name from the Hugging Face hub" in caplog.text) is (cached is None)
