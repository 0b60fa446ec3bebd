"""The settings a model's maker ships for generation, and what a run changes about them.

Owns: reading `generation_config.json` into `GenerationSettings`. Does not know: how tokens are drawn.
"""

from dataclasses import dataclass, replace

from transformers import GenerationConfig, PreTrainedTokenizerBase

from draftsmith.decode.model_settings import honouring
from draftsmith.decode.sampling import GREEDY, GenerationSettings, ReplyOptions
from draftsmith.models.files.model_folder import resolve
from draftsmith.models.files.pretrained import read_config, read_generation_config
from draftsmith.models.target.options import DEFAULTS, TargetOptions


@dataclass(frozen=True, kw_only=True)
class SamplingOverrides:
    """What a run changes about the model's own sampling settings (its generation config); null leaves the model's own.

    Args:
        temperature: 0 takes the likeliest token (greedy); above 0 draws.
        top_k: Draw among the k likeliest tokens; 0 for all.
        top_p: Draw within the smallest set of tokens with this probability.
        min_p: Leave out tokens below this share of the likeliest one's probability.
        repetition_penalty: Above 1 makes tokens already in the text less likely.
    """

    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None


MODELS_OWN = SamplingOverrides()


def reply_settings(
    target: str,
    tokenizer: PreTrainedTokenizerBase,
    overrides: SamplingOverrides = MODELS_OWN,
    reply: ReplyOptions = GREEDY,
    stop_strings: tuple[str, ...] = (),
    where: TargetOptions = DEFAULTS,
) -> GenerationSettings:
    """The target's own settings with a run's changes.

    A target whose generation config does not sample is greedy. Only settings it names are taken: defaults that `transformers` would
    fill in (such as top-k 50) are not the model's. A run that sets a temperature for such a target samples from its plain
    distribution. With `generation_config` none, its end tokens alone are taken.

    Args:
        target: path or hub id.
        tokenizer: the target's.
        overrides: what the run changes.
        reply: length and seed.
        stop_strings: they end a reply.
        where: how the target's files are read, and whether its generation config counts.

    Returns:
        The settings.

    Raises:
        ValueError: the target names no end token, a setting is out of range, or one cannot be honoured.
    """
    own = GenerationConfig()
    if where.generation_config == "model":
        folder = resolve(target, where.revision)
        own = read_generation_config(folder) or GenerationConfig.from_model_config(
            read_config(folder, where.trust_remote_code)
        )
    settings = GenerationSettings(
        max_new_tokens=reply.max_new_tokens,
        repetition_penalty=own.repetition_penalty or 1.0,
        seed=reply.seed,
        eos_token_ids=_end_tokens(target, tokenizer, where),
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


def _end_tokens(target: str, tokenizer: PreTrainedTokenizerBase, where: TargetOptions) -> tuple[int, ...]:
    end_tokens = where.end_tokens(target, tokenizer)
    if not end_tokens:
        raise ValueError(
            f"{target} names no end token, so no reply would ever end; set eos_token_id in its generation config"
        )
    return end_tokens
