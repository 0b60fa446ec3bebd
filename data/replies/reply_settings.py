"""The settings a model's maker ships for generation, and what a run changes about them.

Owns: reading `generation_config.json` into `GenerationSettings`. Does not know: how tokens are drawn.
"""

from dataclasses import dataclass, replace
from typing import Literal

from transformers import GenerationConfig, PreTrainedTokenizerBase

from draftsmith.decode.model_settings import honouring
from draftsmith.decode.sampling import GenerationSettings
from draftsmith.models.files.end_tokens import read_end_tokens
from draftsmith.models.files.model_folder import resolve
from draftsmith.models.files.pretrained import read_config, read_generation_config


@dataclass(frozen=True)
class Overrides:
    """Settings of a run; None leaves the model's own. `temperature` 0 is greedy."""

    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None


def reply_settings(
    target: str,
    tokenizer: PreTrainedTokenizerBase,
    overrides: Overrides,
    max_new_tokens: int,
    seed: int = 0,
    stop_strings: tuple[str, ...] = (),
    revision: str | None = None,
    trust_remote_code: bool = False,
    generation_config: Literal["model", "none"] = "model",
) -> GenerationSettings:
    """The target's own settings with a run's changes.

    A target whose generation config does not sample is greedy. Only settings it names are taken: defaults that
    `transformers` would fill in (such as top-k 50) are not the model's. A run that sets a temperature for such a target
    samples from its plain distribution. With `generation_config` none, its end tokens alone are taken.

    Raises ValueError when the target names no end token, a setting is out of range, or one cannot be honoured.
    """
    own = GenerationConfig()
    if generation_config == "model":
        folder = resolve(target, revision)
        own = read_generation_config(folder) or GenerationConfig.from_model_config(
            read_config(folder, trust_remote_code)
        )
    settings = GenerationSettings(
        max_new_tokens=max_new_tokens,
        repetition_penalty=own.repetition_penalty or 1.0,
        seed=seed,
        eos_token_ids=_end_tokens(target, revision, tokenizer, trust_remote_code),
        stop_strings=stop_strings,
    )
    if own.do_sample:
        settings = replace(
            settings,
            temperature=1.0 if own.temperature is None else own.temperature,
            top_k=own.top_k or 0,
            top_p=1.0 if own.top_p is None else own.top_p,
            min_p=own.min_p or 0.0,
        )
    settings = replace(settings, **{name: value for name, value in vars(overrides).items() if value is not None})
    return honouring(settings, own, target, tells_text=True)


def _end_tokens(
    target: str, revision: str | None, tokenizer: PreTrainedTokenizerBase, trust_remote_code: bool
) -> tuple[int, ...]:
    found = read_end_tokens(target, revision, tokenizer, trust_remote_code)
    if not found:
        raise ValueError(
            f"{target} names no end token, so no reply would ever end; set eos_token_id in its generation config"
        )
    return found
