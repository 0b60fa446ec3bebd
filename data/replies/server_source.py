"""Replies from a server that speaks OpenAI's completions protocol with token ids, such as vLLM's.

Owns: what is asked of it, and the checks of its answers. Does not know: HTTP's mishaps (`http_json.py`), prompts'
files, dialogues.
"""

from __future__ import annotations

import os
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, TypeGuard

from draftsmith.data.replies.http_json import JsonClient, RetryableError
from draftsmith.data.replies.reply_sources import BadReply, RawReply, Unanswered
from draftsmith.data.replies.vllm_sampling import sampling
from draftsmith.decode.sampling import GenerationSettings


@dataclass(frozen=True)
class ServerOptions:
    """A server that answers for --engine server.

    Args:
        url: Address of the server, such as http://host:8000.
        served_model: Name the server knows the target by; default the target's own.
        concurrency: Dialogues that run at the same time.
        retries: Further attempts for a request without an answer.
        timeout: Seconds for one attempt; an answer comes when its reply is whole.
        api_key_variable: Environment variable that holds the server's key, if it wants one.
        skip_failed: Count the replies as complete without the prompts that failed.
    """

    url: str | None = None
    served_model: str | None = None
    concurrency: int = 64
    retries: int = 5
    timeout: float = 600.0
    api_key_variable: str = "OPENAI_API_KEY"
    skip_failed: bool = False


NO_SERVER = ServerOptions()


class ServerEngine:
    """A server as an `IndependentEngine`.

    The server must give back token ids (`return_token_ids`, vLLM from 0.10.2 on): its text, encoded again, would now and then be other
    tokens. Every answer is checked against the request: ids of the prompt, ids that the tokenizer has, the length.

    Args:
        options: where it is and how patiently to ask; `url` is needed.
        target: the model that should answer.
        vocab_size: ids at and above it cannot come from the target.
        context: the target's context in tokens, None for no limit; the server's own, where it names one, counts too.

    Raises:
        ValueError: settings are out of range, the server is not there, or it does not serve the target.
    """

    def __init__(self, options: ServerOptions, target: str, vocab_size: int, context: int | None) -> None:
        if options.url is None:
            raise ValueError("--engine server needs the server's address; give --url, such as --url http://host:8000")
        if options.concurrency < 1:
            raise ValueError(f"concurrency is {options.concurrency}; it must be at least 1")
        self.concurrency, self._vocab_size = options.concurrency, vocab_size
        base = options.url.rstrip("/")
        base = base if base.endswith("/v1") else f"{base}/v1"
        key = os.environ.get(options.api_key_variable, "").strip()
        self._client = JsonClient(base, key, options.timeout, options.retries)
        with ExitStack() as on_failure:
            on_failure.callback(self._client.close)
            served, self._names = self._served(target, options.served_model)
            on_failure.pop_all()
        self.model = str(served["id"])
        limits = [limit for limit in (context, served.get("max_model_len")) if isinstance(limit, int)]
        self.context = min(limits, default=None)

    def budget(self, prompt: list[int], settings: GenerationSettings) -> int:
        """See `IndependentEngine.budget`."""
        return (
            settings.max_new_tokens
            if self.context is None
            else min(settings.max_new_tokens, self.context - len(prompt))
        )

    def ask(self, prompt: list[int], settings: GenerationSettings, request_id: int) -> RawReply:
        """See `IndependentEngine.ask`."""
        budget = self.budget(prompt, settings)
        body = {"model": self.model, "prompt": prompt, "n": 1, "stream": False, "return_token_ids": True}
        body |= sampling(settings, request_id, budget)
        return self._client.post("/completions", body, lambda answer: self._read(answer, prompt, budget))

    def _read(self, answer: dict[str, Any], prompt: list[int], budget: int) -> RawReply:
        """The reply in an answer to a prompt.

        Raises:
            RetryableError: the answer holds no reply.
            BadReply: the reply cannot be the target's.
            ValueError: the server read another prompt, runs another model, or gives no token ids.
        """
        choices, url = answer.get("choices"), self._client.url
        if not isinstance(choices, list) or len(choices) != 1 or not isinstance(choices[0], dict):
            raise RetryableError(f"an answer without its one choice: {str(answer)[:80]}")
        choice: dict[str, Any] = choices[0]
        token_ids, echo, finish = choice.get("token_ids"), choice.get("prompt_token_ids"), choice.get("finish_reason")
        if (named := str(answer.get("model", self.model))) not in self._names:
            raise ValueError(
                f"{url} was asked for {self.model} and answered with {named}; if this is a router, let it send requests to the target alone"
            )
        if finish not in ("stop", "length"):
            raise RetryableError(f"the server ended the reply with {finish!r}")
        if not _are_ids(token_ids) or not _are_ids(echo):
            raise ValueError(
                f"{url} gives text without token ids, and encoding it again would now and then give other tokens; serve with vLLM 0.10.2 "
                "or later, or with another server that knows return_token_ids"
            )
        if echo != prompt:
            raise ValueError(
                f"{url} read another prompt than it was sent: {len(echo)} tokens {echo[:8]} instead of {len(prompt)} tokens {prompt[:8]}; "
                "its replies are to something else; serve the target with its own tokenizer and without changes to prompts"
            )
        if foreign := [token for token in token_ids if token >= self._vocab_size]:
            raise BadReply(
                f"{url} replied with token {foreign[0]}, the target's tokenizer has {self._vocab_size}: it serves another model under the "
                "name of the target; serve the target"
            )
        if not 1 <= len(token_ids) <= budget:
            raise BadReply(
                f"{url} replied with {len(token_ids)} tokens where 1 to {budget} were asked for; it does not keep to max_tokens"
            )
        return RawReply(token_ids, finish)

    def close(self) -> None:
        """See `IndependentEngine.close`."""
        self._client.close()

    def _served(self, target: str, name: str | None) -> tuple[dict[str, Any], set[str]]:
        """The server's entry for the target, and every name that its answers may then go by."""
        try:
            listed = self._client.get("/models", lambda answer: answer.get("data"))
        except Unanswered as error:
            raise ValueError(f"{self._client.url} does not answer: {error}; is the server running?") from error
        models = (
            [entry for entry in listed if isinstance(entry, dict) and "id" in entry] if isinstance(listed, list) else []
        )
        wanted = name or target
        for entry in models:
            if entry["id"] == wanted or (name is None and entry.get("root") == target):
                # A model that is served under several names answers with the first of them.
                same = {
                    str(other["id"]) for other in models if (other.get("root") or other) == (entry.get("root") or entry)
                }
                return entry, same | {target}
        names = ", ".join(str(entry["id"]) for entry in models) or "nothing"
        raise ValueError(
            f"{self._client.url} serves {names}, not {wanted}; serve the target itself, or say with --served-model under which of these "
            "names it is served"
        )


def _are_ids(value: Any) -> TypeGuard[list[int]]:
    return isinstance(value, list) and all(type(token) is int and token >= 0 for token in value)
