"""Replies from vLLM in this process, on its own GPUs.

Owns: how vLLM is built and called. Does not know: servers, prompts' files, dialogues.
"""

from __future__ import annotations

from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from draftsmith.data.replies.reply_sources import RawReply, Reply
from draftsmith.data.replies.vllm_sampling import check_settings, sampling, settle
from draftsmith.decode.sampling import GenerationSettings
from draftsmith.extras import install_command
from draftsmith.models.files.model_folder import resolve


@dataclass(frozen=True)
class VllmOptions:
    """What vLLM may take for --engine vllm.

    Args:
        tensor_parallel: GPUs that share the target.
        memory_share: Share of each GPU's memory that vLLM takes.
    """

    tensor_parallel: int = 1
    memory_share: float = 0.9


ONE_GPU = VllmOptions()


class VllmEngine:
    """`vllm.LLM` as a response engine: token ids in, token ids out. It batches by itself, so give it large batches.

    Args:
        target: the model that replies.
        tokenizer: the target's, for stop strings.
        options: what it may take.
        dtype: of the weights.
        revision: of the target on the hub.
        context: the target's context in tokens, None for no limit.

    Raises:
        ValueError: vLLM is not installed.
    """

    def __init__(
        self,
        target: str,
        tokenizer: PreTrainedTokenizerBase,
        options: VllmOptions = ONE_GPU,
        dtype: str = "bfloat16",
        revision: str | None = None,
        context: int | None = None,
    ) -> None:
        try:
            import vllm
        except ImportError as error:
            raise ValueError(
                f"--engine vllm needs vLLM, which is not installed; run: {install_command('vllm')}; or ask a server (--engine server)"
            ) from error
        self._vllm, self._tokenizer, self._context = vllm, tokenizer, context
        self._llm = vllm.LLM(
            model=str(resolve(target, revision)),
            dtype=dtype,
            tensor_parallel_size=options.tensor_parallel,
            gpu_memory_utilization=options.memory_share,
            # Every setting is given with each request; the model's own would fill in what is not.
            generation_config="vllm",
        )

    def reply(self, prompts: list[list[int]], settings: GenerationSettings, request_ids: list[int]) -> list[Reply]:
        """See `ResponseEngine.reply`.

        Raises:
            ValueError: a setting means something else to vLLM, or it read other prompts, or ended a reply for a reason of its own.
        """
        check_settings(settings)
        budgets = [self._budget(prompt, settings) for prompt in prompts]
        outputs = self._llm.generate(
            [{"prompt_token_ids": prompt} for prompt in prompts],
            [
                self._vllm.SamplingParams(**sampling(settings, request_id, budget))
                for request_id, budget in zip(request_ids, budgets, strict=True)
            ],
            use_tqdm=False,
        )
        replies = []
        for prompt, budget, output in zip(prompts, budgets, outputs, strict=True):
            if list(output.prompt_token_ids) != prompt:
                raise ValueError(
                    f"vLLM read {len(output.prompt_token_ids)} tokens where it was given {len(prompt)}; its replies are to something else"
                )
            [choice] = output.outputs
            raw = RawReply(list(choice.token_ids), str(choice.finish_reason))
            replies.append(settle(raw, settings, budget, self._tokenizer))
        return replies

    def _budget(self, prompt: list[int], settings: GenerationSettings) -> int:
        room = settings.max_new_tokens if self._context is None else self._context - len(prompt)
        return min(settings.max_new_tokens, room)
