"""The draft LM in training: its weights or its adapter, and the same weights as a target that decodes.

Owns: how it is loaded and checked, LoRA by PEFT, the structure that decodes with the weights of this very step, sampling of
continuations. Does not know: losses, batches, the run.

Shape legend: B batch rows, T positions, D hidden, V vocabulary.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Sequence
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from draftsmith.decode.engine import Engine
from draftsmith.decode.sampling import GenerationSettings
from draftsmith.models.drafters.draft_lm import LMDrafter, check_architecture
from draftsmith.models.files.device_and_dtype import as_dtype
from draftsmith.models.files.fingerprint import checkpoint_fingerprint, tokenizer_fingerprint
from draftsmith.models.files.loading import load_causal_lm, load_tokenizer
from draftsmith.models.files.model_folder import resolve
from draftsmith.models.target.target import Target
from draftsmith.models.trunk.known_models import text_base
from draftsmith.train.draft_lm.first_layers import keep_first_layers
from draftsmith.train.drafter.starting_drafter import LoraSettings


class DraftLMTarget(Target):
    """The draft LM as a decoder runs it: a target whose logits cover only the tokens that the real target has too."""

    num_shared: int | None = None

    def logits(self, normed: Tensor) -> Tensor:
        """Logits of the tokens that both models have.

        Args:
            normed: [..., D], states after the final norm.

        Returns:
            [..., V].
        """
        return super().logits(normed)[..., : self.num_shared]


class Student:
    """A causal LM whose weights, or whose adapter, are trained.

    Its module is kept by the training module, which sees to devices and checkpoints.

    Args:
        path: directory, hub id or `embedded:draft_lm`.
        lm: the model as loaded.
        target_vocab_size: rows of the target's head.
        lora: train an adapter, by default of every linear layer but the output head; None trains all weights.
    """

    def __init__(self, path: str, lm: PreTrainedModel, target_vocab_size: int, lora: LoraSettings | None) -> None:
        self.path = path
        self.lm = lm.eval()
        self.adapter: PeftModel | None = None
        self._target_vocab_size = target_vocab_size
        self._as_target: tuple[tuple[object, ...], DraftLMTarget] | None = None
        self._cast: DraftLMTarget | None = None
        if lora is None:
            lm.requires_grad_(True)
            return
        config = LoraConfig(
            r=lora.rank,
            lora_alpha=lora.alpha,  # type: ignore[arg-type]  # PEFT divides it, so a float will do
            target_modules=lora.target_modules or "all-linear",
            task_type="CAUSAL_LM",
        )
        adapted = get_peft_model(lm, config)
        assert isinstance(adapted, PeftModel)
        # Where decoding finds the base again, from whatever folder it is called.
        adapted.peft_config["default"].base_model_name_or_path = (
            str(Path(path).resolve()) if Path(path).exists() else path
        )
        self.adapter = adapted.eval()

    @classmethod
    def load(
        cls,
        path: str,
        dtype: str,
        target: Target,
        target_tokenizer: PreTrainedTokenizerBase,
        lora: LoraSettings | None,
        num_layers: int | None = None,
    ) -> Student:
        """A draft LM for a target.

        Args:
            path: directory, hub id or `embedded:draft_lm`.
            dtype: of its weights.
            target: the run's.
            target_tokenizer: the target's.
            lora: train an adapter; None trains all weights.
            num_layers: keep only so many layers, the first ones; None keeps all.

        Raises:
            ValueError: no causal LM, an adapter's folder, another tokenizer than the target's, or fewer layers than `num_layers`.
        """
        folder = resolve(path)
        if not (folder / "config.json").is_file():
            raise ValueError(
                f"{path} is an adapter; give the draft LM's own directory, or merge the adapter into it first (PEFT's merge_and_unload)"
            )
        check_architecture(folder)
        own, wanted = (tokenizer_fingerprint(words) for words in (load_tokenizer(path), target_tokenizer))
        if own != wanted:
            raise ValueError(
                f"the draft LM {path!r} has another tokenizer ({own[:12]}) than the target ({wanted[:12]}); token ids would not mean the "
                "same; use an LM of the target's own model family, with its tokenizer"
            )
        lm, _ = load_causal_lm(path, as_dtype(dtype))
        if num_layers is not None:
            keep_first_layers(lm, num_layers, path)
        return cls(path, lm, target.ends.vocab_size, lora)

    @functools.cached_property
    def fingerprint(self) -> str:
        """Of the weights that training began with, as they were on disk at the first call."""
        return checkpoint_fingerprint(resolve(self.path))

    @property
    def vocab_size(self) -> int:
        """Rows of its own embedding."""
        return int(self.lm.get_input_embeddings().weight.shape[0])

    def known(self, ids: Tensor) -> Tensor:
        """Token ids as ids that the draft LM can embed, as `LMDrafter` reads them.

        Args:
            ids: int64 of any shape.
        """
        return ids.clamp(max=self.vocab_size - 1)

    def states(self, ids_BT: Tensor) -> Tensor:
        """Normed states, with a gradient.

        Args:
            ids_BT: int64 [B, T], padded on the right.

        Returns:
            [B, T, D].
        """
        states: Tensor = text_base(self.lm)(input_ids=self.known(ids_BT), use_cache=False).last_hidden_state
        return states

    def head_parameters(self) -> list[nn.Parameter]:
        """What of the output head is trained."""
        return [weight for weight in self.lm.get_output_embeddings().parameters() if weight.requires_grad]

    def as_target(self) -> DraftLMTarget:
        """The same parameters in a second structure, which decodes. It always decodes with the current weights.

        The first structure stays as Lightning and DDP know it: without hooks, with its gradients.
        """
        device = next(self.lm.parameters()).device
        key = (device, *map(id, self.lm.parameters()))
        if self._as_target is None or self._as_target[0] != key:
            # Made outside of inference mode, in which a validation may be, so that its buffers serve training too.
            with torch.inference_mode(False):
                trained = [weight.requires_grad for weight in self.lm.parameters()]
                twin = copy.deepcopy(self.lm, {id(weight): weight for weight in self.lm.parameters()})
                as_target = DraftLMTarget(twin, self.path, fingerprint="")
                for weight, flag in zip(self.lm.parameters(), trained, strict=True):
                    weight.requires_grad_(flag)
                as_target.num_shared = min(as_target.ends.vocab_size, self._target_vocab_size)
            self._as_target = key, as_target
        return self._as_target[1]

    def drafter(self) -> LMDrafter:
        """It as a drafter, with the current weights."""
        return LMDrafter(self.as_target()).eval()

    def sample(
        self, prompts: list[list[int]], settings: GenerationSettings, requests: Sequence[int], rows: int
    ) -> list[list[int]]:
        """The draft LM's own continuations.

        A continuation depends on the weights, the prompt, `settings.seed` and the request number alone.

        Args:
            prompts: token ids.
            settings: of the sampling.
            requests: a number for each prompt, which fixes its noise.
            rows: prompts decoded together.
        """
        engine = Engine(self._sampler())
        last = self.vocab_size - 1
        known = [[min(token, last) for token in prompt] for prompt in prompts]
        replies: list[list[int]] = []
        with torch.autocast(engine.target.device.type, enabled=False):
            for start in range(0, len(known), rows):
                part = slice(start, start + rows)
                generations = engine.generate(known[part], settings, request_ids=list(requests[part]))
                replies += [generation.token_ids for generation in generations]
        return replies

    def _sampler(self) -> DraftLMTarget:
        """What samples now: under autocast, a copy in its dtype.

        The decoder casts nothing on the way. What autocast casts here it would keep, outside of any graph, for the training forward that
        follows.
        """
        kind = self.as_target().device.type
        if not torch.is_autocast_enabled(kind):
            return self.as_target()
        with torch.inference_mode(False), torch.no_grad(), torch.autocast(kind, enabled=False):
            if self._cast is None:
                self._cast = DraftLMTarget(self._copied(torch.get_autocast_dtype(kind)), self.path, fingerprint="")
                self._cast.num_shared = self.as_target().num_shared
            for cast, weight in zip(self._cast.model.parameters(), self.lm.parameters(), strict=True):
                cast.copy_(weight)
        return self._cast

    @torch.no_grad()
    def _copied(self, dtype: torch.dtype) -> PreTrainedModel:
        """A copy with weights of another dtype. Buffers stay as they are: rounded rotary frequencies would turn far tokens elsewhere."""
        weights = list(self.lm.parameters())
        return copy.deepcopy(
            self.lm, {id(weight): nn.Parameter(weight.to(dtype, copy=True), False) for weight in weights}
        )

    def save(self, folder: Path, tokenizer: PreTrainedTokenizerBase, dtype: torch.dtype | None = None) -> None:
        """Writes what `load_draft_lm` reads: the whole model, or the adapter as PEFT writes it, with the tokenizer.

        Args:
            folder: existing.
            tokenizer: of both models.
            dtype: of a whole model's weights; None keeps that of training.
        """
        if self.adapter is not None:
            # PEFT would ask the hub whether the vocabulary is still the base's.
            self.adapter.save_pretrained(str(folder), save_embedding_layers=False)
        elif dtype is None:
            self.lm.save_pretrained(folder)
        else:
            self._copied(dtype).save_pretrained(folder)
        tokenizer.save_pretrained(folder)
