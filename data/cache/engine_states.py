"""Hidden states that a serving engine computed: quantised giants live in engines, and training needs only their states.

vLLM's speculative method `extract_hidden_states` writes a safetensors file a request, and speculators keeps such files as
`hs_0.safetensors`, `hs_1.safetensors`, ... Each holds

- `token_ids` [T], what the engine read,
- `hidden_states` [T, L, D], the states behind the layers that it was asked for, before the final norm,
- `hidden_states_scales` [T, 1, 1], in early versions [T, 1], where the states have eight bits.

Layers are counted as vLLM counts them: n is the state behind n decoder blocks. Of a model of 32 blocks, 3 is `layer.2.output` and 32 is
`last.pre_norm`.

Owns: this layout, where the file of a sample is, and what is asked of a server. Does not know: caches, samples' files, our own forwards.
"""

from __future__ import annotations

import fcntl
import hashlib
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import safetensors
import torch
from torch import Tensor

from draftsmith.data.chats.tokenized_samples import TokenizedSample
from draftsmith.data.progress import progress
from draftsmith.data.replies.http_json import JsonClient, RetryableError
from draftsmith.models.target.target import PRE_NORM, TargetEnds

_TOKENS, _STATES, _SCALES = "token_ids", "hidden_states", "hidden_states_scales"
_WAIT_SECONDS = 60.0
_CONCURRENCY = 16


@dataclass(frozen=True)
class EngineOptions:
    """States that a serving engine computes, in place of the target in this process.

    Args:
        states: Folder of safetensors files that vLLM's `extract_hidden_states` or speculators wrote; the target itself is not run.
        states_layers: Layers of these files in order, as the engine counts them: n is the state behind n decoder blocks.
        states_url: Address of a vLLM server that writes into the folder what it is asked for, such as http://host:8000.

    Raises:
        ValueError: a folder without its layers, or layers or an address without a folder.
    """

    states: Path | None = None
    states_layers: tuple[int, ...] = ()
    states_url: str | None = None

    def __post_init__(self) -> None:
        if self.states is None and (self.states_layers or self.states_url is not None):
            raise ValueError(
                "states_layers and states_url describe the states of an engine; name their folder, too (--states)"
            )
        if self.states is not None and not self.states_layers:
            raise ValueError(
                "--states needs --states-layers: the layers of its files in order, as the engine was given them, "
                "such as [2, 16, 29, 32]"
            )


NO_ENGINE = EngineOptions()


class StatesSource(Protocol):
    """Where an engine's states come from."""

    def read(self, samples: Sequence[TokenizedSample]) -> Iterator[dict[str, Tensor]]:
        """Give the states of samples.

        Args:
            samples: in tokens.

        Yields:
            Of each sample, in order: layer name -> [T, D].
        """


def layer_names(layers: Sequence[int], num_layers: int, name: str) -> tuple[str, ...]:
    """Translate layers as vLLM counts them into our names.

    Example: of a model of 32 blocks, (3, 32) are ("layer.2.output", "last.pre_norm").

    Args:
        layers: n is the state behind n decoder blocks.
        num_layers: decoder blocks of the model.
        name: of the model, for the message.

    Returns:
        Our names, in the same order.

    Raises:
        ValueError: a layer twice, or one that the model has not. The embeddings (0) are no layer.
    """
    wrong = [layer for layer in layers if not 1 <= layer <= num_layers]
    if wrong or len(set(layers)) < len(layers):
        raise ValueError(
            f"states_layers are {list(layers)}; give each layer once, from 1 to {num_layers} (the last block of {name}): n is the state "
            "behind n decoder blocks"
        )
    return tuple(PRE_NORM if layer == num_layers else f"layer.{layer - 1}.output" for layer in layers)


def open_source(options: EngineOptions, ends: TargetEnds, stored: Sequence[str], max_length: int) -> StatesSource:
    """Open where an engine's states come from.

    Args:
        options: what the user named; with a folder.
        ends: of the target.
        stored: the layers that a cache shall hold.
        max_length: samples are cut to this many tokens.

    Returns:
        The source.

    Raises:
        ValueError: the folder is missing or has no files, a layer is wrong, or the server cannot be asked.
    """
    assert options.states is not None
    names = layer_names(options.states_layers, int(ends.config.num_hidden_layers), ends.name)
    for layer in stored:
        if layer not in names:
            raise ValueError(
                f"layer {layer!r} is not among those of the engine's files ({', '.join(names)}); store some of these (--layers), or let "
                "the engine write it, too"
            )
    layout = StatesLayout(names, ends.hidden_size)
    if options.states_url is None:
        return FolderStates(options.states, layout, max_length)
    return ServerStates(options.states, layout, JsonClient(f"{options.states_url.rstrip('/').removesuffix('/v1')}/v1"))


@dataclass(frozen=True)
class StatesLayout:
    """What an engine's files hold.

    Attributes:
        layers: our names, in the order of the files.
        hidden_size: D.
    """

    layers: tuple[str, ...]
    hidden_size: int

    def read(self, path: Path, token_ids: Sequence[int]) -> dict[str, Tensor]:
        """Read a file's states.

        Args:
            path: of the file.
            token_ids: of the sample. The file may hold more tokens behind them.

        Returns:
            Layer name -> [T, D], T the sample's tokens.

        Raises:
            ValueError: the file is damaged, has other tensors, or is of other tokens.
        """
        _wait_for_writer(path)
        length = len(token_ids)
        if _tokens_of(path)[:length].tolist() != list(token_ids):
            raise ValueError(
                f"{path} holds the states of other tokens than the sample's; let the engine read the sample again"
            )
        with _opened(path) as file:
            shape = file.get_slice(_STATES).get_shape()
            if len(shape) != 3 or shape[1:] != [len(self.layers), self.hidden_size] or shape[0] < length:
                raise ValueError(
                    f"{path}: {_STATES} has the shape {shape}; these layers of this target make [tokens, {len(self.layers)}, "
                    f"{self.hidden_size}]; name the layers that the engine was given (--states-layers), or the right target"
                )
            states_TLD = file.get_slice(_STATES)[:length]
            if _SCALES in set(file.keys()):
                scales = file.get_slice(_SCALES)[:length].float()
                if scales.numel() != length:
                    raise ValueError(
                        f"{path}: {_SCALES} has the shape {list(scales.shape)}; it is one number for each of {length} tokens; let the "
                        "engine write it again"
                    )
                states_TLD = states_TLD.float() * scales.reshape(length, 1, 1)
        if not states_TLD.is_floating_point():
            raise ValueError(
                f"{path}: {_STATES} is {states_TLD.dtype}, no floating point; let the engine write it again"
            )
        return {name: states_TLD[:, place] for place, name in enumerate(self.layers)}


class FolderStates:
    """States in a folder of files, found by their tokens; only those are read at first.

    Args:
        folder: of the files; subfolders count.
        layout: what they hold.
        max_length: samples are cut to this many tokens.

    Raises:
        ValueError: there is no such folder, it has no safetensors files, or one of them is damaged.
    """

    def __init__(self, folder: Path, layout: StatesLayout, max_length: int) -> None:
        self._folder, self._layout = folder, layout
        files = sorted(folder.rglob("*.safetensors"))
        if not files:
            raise ValueError(
                f"{folder} has no *.safetensors; give the folder that the engine wrote to (shared_storage_path), or run it first"
            )
        self._paths: dict[bytes, Path] = {}
        with progress("states", len(files), "files") as advance:
            for path in files:
                _wait_for_writer(path)
                self._paths[_key(_tokens_of(path)[:max_length].tolist())] = path
                advance(1)

    def read(self, samples: Sequence[TokenizedSample]) -> Iterator[dict[str, Tensor]]:
        """See :meth:`StatesSource.read`.

        Raises:
            ValueError: no file holds a sample's tokens, or its file is damaged.
        """
        for sample in samples:
            path = self._paths.get(_key(sample.input_ids))
            if path is None:
                raise ValueError(
                    f"sample {sample.id}: none of the {len(self._paths)} files in {self._folder} holds its {len(sample.input_ids)} tokens "
                    "from the first to the last; let the engine read these ids (or ask it from here: --states-url), or take the sample out"
                )
            yield self._layout.read(path, sample.input_ids)


class Asks(Protocol):
    """What asks a server; see :class:`~draftsmith.data.replies.http_json.JsonClient`."""

    url: str

    def get(self, path: str, read: Callable[[dict[str, Any]], str]) -> str: ...

    def post(self, path: str, body: dict[str, Any], read: Callable[[dict[str, Any]], Path]) -> Path: ...


class ServerStates:
    """States of a server that runs `extract_hidden_states` and writes into a folder that this process sees, too.

    A file is deleted once it is read, as its reader should do.

    Args:
        folder: that the server writes to.
        layout: what its files hold.
        client: asks the server.
    """

    def __init__(self, folder: Path, layout: StatesLayout, client: Asks) -> None:
        self._folder, self._layout, self._client = folder.resolve(), layout, client
        self._model = client.get("/models", _model_name)

    def read(self, samples: Sequence[TokenizedSample]) -> Iterator[dict[str, Tensor]]:
        """See :meth:`StatesSource.read`.

        Raises:
            ValueError: an answer without a file, a file outside of the folder, or one that is damaged or of other tokens.
        """
        with ThreadPoolExecutor(_CONCURRENCY) as pool:
            yield from pool.map(self._ask, samples)

    def _ask(self, sample: TokenizedSample) -> dict[str, Tensor]:
        body = {"model": self._model, "prompt": sample.input_ids, "max_tokens": 1, "return_token_ids": True}
        path = self._client.post("/completions", body, self._path)
        states = self._layout.read(path, sample.input_ids)
        path.unlink()
        Path(f"{path}.lock").unlink(missing_ok=True)
        return states

    def _path(self, answer: dict[str, Any]) -> Path:
        given = (answer.get("kv_transfer_params") or {}).get("hidden_states_path")
        if not isinstance(given, str):
            raise ValueError(
                f"{self._client.url} names no file of states (kv_transfer_params.hidden_states_path); serve with the speculative method "
                "extract_hidden_states and the ExampleHiddenStatesConnector"
            )
        path = Path(given).resolve()
        if not path.is_relative_to(self._folder):
            raise ValueError(
                f"{self._client.url} wrote to {path}, outside of {self._folder}; give the server's shared_storage_path as --states"
            )
        return path


def _model_name(answer: dict[str, Any]) -> str:
    listed = answer.get("data")
    if not isinstance(listed, list) or not listed or not isinstance(listed[0], dict) or "id" not in listed[0]:
        raise RetryableError("the server lists no model")
    return str(listed[0]["id"])


def _key(token_ids: Sequence[int]) -> bytes:
    return hashlib.sha256(torch.tensor(token_ids, dtype=torch.int64).numpy().tobytes()).digest()


def _opened(path: Path) -> Any:
    """The file.

    Raises:
        ValueError: it is missing, damaged, or has not the tensors of an engine's states.
    """
    try:
        file = safetensors.safe_open(path, "pt")
    except (OSError, safetensors.SafetensorError) as error:
        raise ValueError(f"{path} cannot be read ({error}); let the engine write it again, or delete it") from error
    missing = {_TOKENS, _STATES} - set(file.keys())
    if missing:
        raise ValueError(
            f"{path} has no {' and no '.join(sorted(missing))}; give a folder in which every *.safetensors holds an engine's states"
        )
    return file


def _tokens_of(path: Path) -> Tensor:
    with _opened(path) as file:
        token_ids: Tensor = file.get_tensor(_TOKENS)
    if token_ids.ndim != 1 or token_ids.is_floating_point():
        raise ValueError(f"{path}: {_TOKENS} is {token_ids.dtype} {list(token_ids.shape)}; it is one list of token ids")
    return token_ids


def _wait_for_writer(path: Path) -> None:
    """Wait until the engine has written a file; it holds a lock on a file beside it meanwhile.

    Raises:
        ValueError: it takes more than a minute.
    """
    lock, until = Path(f"{path}.lock"), time.monotonic() + _WAIT_SECONDS
    while lock.exists():
        with open(lock, "rb") as handle:
            try:
                fcntl.flock(handle, fcntl.LOCK_SH | fcntl.LOCK_NB)
                return
            except BlockingIOError:
                if time.monotonic() >= until:
                    raise ValueError(
                        f"{path} has been in writing for {_WAIT_SECONDS:.0f} s; is the engine still running?"
                    ) from None
        time.sleep(0.05)
