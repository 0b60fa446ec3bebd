"""Shards behind a URL: fetched ahead into a folder of this node."""

from draftsmith.public import names_of

__getattr__ = names_of("draftsmith.data.remote.remote_folder")
