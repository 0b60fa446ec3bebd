"""What generates replies for a run: which engine, which options go with it, and what the replies then depend on.

Owns: the choice and its rules. Does not know: how an engine replies, prompts, files.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Self

from transformers import PreTrainedTokenizerBase

from draftsmith.data.replies.reply_files import loaded_here
from draftsmith.data.replies.reply_plan import SMALL_BATCHES, BatchOptions
from draftsmith.data.replies.reply_sources import BundledEngine, IndependentEngine, ResponseEngine
from draftsmith.data.replies.server_source import NO_SERVER, ServerEngine, ServerOptions
from draftsmith.data.replies.vllm_sampling import check_settings
from draftsmith.data.replies.vllm_source import ONE_GPU, VllmEngine, VllmOptions
from draftsmith.decode.runners import Compile
from draftsmith.decode.sampling import GenerationSettings
from draftsmith.models.target.options import DEFAULTS, TargetOptions
from draftsmith.models.tree.limits import DraftLimits

EngineName = Literal["bundled", "vllm", "server"]
# The options of a target that mean something to an engine which loads it by its own means.
_READ_BY = {
    "vllm": ("revision", "context", "generation_config", "dtype"),
    "server": ("revision", "context", "generation_config", "adapter", "trust_remote_code"),
}


@dataclass(frozen=True)
class EngineChoice:
    """An engine with everything that only some engines read.

    Attributes:
        name: which engine.
        drafter: a trained drafter, for the bundled decoder.
        limits: how much it drafts.
        batches: how many prompts are answered together; a server batches by itself.
        server: for a server.
        vllm: for vLLM in this process.
        compile: how the bundled decoder runs its cycles.
    """

    name: EngineName = "bundled"
    drafter: Path | None = None
    limits: DraftLimits | None = None
    batches: BatchOptions = SMALL_BATCHES
    server: ServerOptions = NO_SERVER
    vllm: VllmOptions = ONE_GPU
    compile: Compile = "auto"

    def check(self, where: TargetOptions) -> Self:
        """Check that no option would be dropped in silence.

        Args:
            where: the target's options.

        Returns:
            This choice.

        Raises:
            ValueError: an option is set that the chosen engine does not read.
        """
        if self.name != "server":
            self._refuse(_changed(vars(self.server), vars(NO_SERVER)), "goes with --engine server")
        if self.name != "vllm":
            self._refuse(_changed(vars(self.vllm), vars(ONE_GPU)), "goes with --engine vllm")
        if self.name == "bundled":
            return self
        if self.name == "server":
            own = vars(self.batches) | {"dtype": where.dtype}
            changed = _changed(own, vars(SMALL_BATCHES) | {"dtype": DEFAULTS.dtype})
            self._refuse(changed, "has no effect on a server, which batches by itself and has a dtype of its own")
        changed = {
            name: value
            for name, value in _changed(vars(where), vars(DEFAULTS)).items()
            if name not in _READ_BY[self.name]
        }
        changed |= {name: getattr(self, name) for name in ("drafter", "limits") if getattr(self, name) is not None}
        changed |= {} if self.compile == "auto" else {"compile": self.compile}
        self._refuse(changed, "is an option of the bundled decoder", with_value=False)
        return self

    def facts(self) -> dict[str, Any]:
        """What a record of the run names besides its identity, none of which changes a reply."""
        concurrency = self.server.concurrency if self.name == "server" else None
        return {"drafter": self.drafter, "concurrency": concurrency, "compile": self.compile}

    def _refuse(self, options: Mapping[str, Any], rule: str, with_value: bool = True) -> None:
        """Check that none of some options is set.

        Raises:
            ValueError: for the first one that is.
        """
        for name, value in options.items():
            shown = f"--{name} {value}" if with_value else f"--{name}"
            raise ValueError(f"{shown} {rule}, and --engine is {self.name}; leave one of the two out")

    def open(
        self, target: str, tokenizer: PreTrainedTokenizerBase, settings: GenerationSettings, where: TargetOptions
    ) -> OpenEngine:
        """Make the engine ready to answer.

        Args:
            target: path or hub id.
            tokenizer: the target's.
            settings: of generation.
            where: the target's options.

        Returns:
            The engine, with its context and identity.

        Raises:
            ValueError: it cannot be had, or cannot keep the settings.
        """
        if self.name == "bundled":
            loaded = where.load_to_decode(target)
            bundled = BundledEngine(loaded, self.drafter, self.limits, tokenizer, where.trust_remote_code, self.compile)
            identity = {"target_fingerprint": loaded.fingerprint} | loaded_here(where) | vars(self.batches)
            return OpenEngine(bundled, loaded.max_positions, identity)
        check_settings(settings)
        ends = where.load_ends(target)
        identity = {"target_fingerprint": ends.fingerprint, "engine": self.name}
        if self.name == "vllm":
            vllm = VllmEngine(target, tokenizer, self.vllm, where.dtype, where.revision, ends.max_positions)
            return OpenEngine(vllm, ends.max_positions, identity | vars(self.batches))
        server = ServerEngine(self.server, target, len(tokenizer), ends.max_positions)
        # A server's dtype is not ours to know.
        identity |= {"dtype": None, "served_model": server.model, "context": server.context, "url": self.server.url}
        return OpenEngine(server, server.context, identity)


@dataclass(frozen=True)
class OpenEngine:
    """An engine that can answer.

    Attributes:
        engine: the engine.
        context: most tokens of prompt and reply together, None for no limit.
        identity: what replies depend on by the choice of this engine.
    """

    engine: ResponseEngine | IndependentEngine
    context: int | None
    identity: dict[str, Any]


def _changed(options: Mapping[str, Any], defaults: Mapping[str, Any]) -> dict[str, Any]:
    """The options that are not at their default."""
    return {name: value for name, value in options.items() if value != defaults[name]}
