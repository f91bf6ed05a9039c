"""Completions from an OpenAI-compatible server (vLLM, llama.cpp): bounded concurrency, retries, a limit on tokens.

One request for each completion, with a seed of its own; sharing prefixes is left to the server. Every completion is
handed on as soon as it is there, so that nothing is lost when the server or this process stops.
"""

from __future__ import annotations

import json
import os
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from typing import Any

from zoo.errors import RunError, UsageError
from zoo.methods.cot_potential.engine import Job, Meter, Opened, Sink
from zoo.methods.cot_potential.streams import Policy, row_keys

#: Written after a completion that the model has ended, so that one that ran out of its budget can be told from it.
END = "\x03"
#: Answers of a server that may be otherwise a moment later.
_TRANSIENT = (408, 409, 425, 429, 500, 502, 503, 504)
#: Characters of an unexpected answer that an error shows.
_SHOWN = 120


class _Busy(Exception):
    """The server may answer otherwise a moment later."""


class ServerEngine:
    """Draws completions of texts from `<url>/completions`.

    Cuts lie between characters of the text, so that completions of a prefix are not those of its tokens: survivors are
    not reused.

    Args:
        policy: How completions are drawn; the budget counts the server's tokens.
        url: Address up to and with `/v1`.
        model: Name of the model there.
        concurrency: Most requests at the same time.
        retries: How often a request is made again that timed out, was refused for now, or was answered with garbage.
        timeout: Seconds that an answer may take.
        backoff: Seconds before the first retry; doubled for each one after it.
        max_tokens_total: Most tokens that the server may write for this engine; 0 for no limit.
        api_key_env: Name of the variable of the environment that holds the key; empty for none.

    Raises:
        ValueError: If a value is out of range.
    """

    reuses = False

    def __init__(
        self,
        policy: Policy,
        url: str,
        model: str,
        concurrency: int = 8,
        retries: int = 5,
        timeout: float = 120.0,
        backoff: float = 1.0,
        max_tokens_total: int = 0,
        api_key_env: str = "",
    ) -> None:
        if not url.startswith(("http://", "https://")):
            raise ValueError(f"server.url: {url!r} is not accepted; accepted: http://... or https://..., up to /v1")
        for key, value, least in (("concurrency", concurrency, 1), ("retries", retries, 0), ("timeout", timeout, 1e-3)):
            if value < least:
                raise ValueError(f"server.{key}: {value} is not accepted; accepted: {least} or more")
        if api_key_env and api_key_env not in os.environ:
            raise ValueError(f"server.api_key_env: the environment has no variable {api_key_env!r}")
        self.policy, self.url, self.model = policy, url.rstrip("/"), model
        self.concurrency, self.retries, self.timeout, self.backoff = concurrency, retries, timeout, backoff
        self.max_tokens_total, self.meter = max_tokens_total, Meter()
        self._headers = {"Content-Type": "application/json"}
        if api_key_env:
            self._headers["Authorization"] = f"Bearer {os.environ[api_key_env]}"
        self._prompt_tokens: dict[str, int] = {}

    def open(self, key: str, prompt: str, trace: str, cuts: Sequence[int]) -> Opened:
        """Nothing is run: the server shares prefixes.

        Raises:
            ValueError: If the prompt is empty.
        """
        if not prompt:
            raise ValueError(f"trace {key!r}: the prompt is empty")
        return Opened(key, prompt, trace)

    def complete(
        self, jobs: Sequence[Job], most: int = 0, stop: Sequence[str] = (), sink: Sink | None = None
    ) -> list[list[str]]:
        """Draw completions; see `Sampler`.

        Raises:
            RunError: If the server does not answer as it should in spite of retries, or the limit on tokens is reached.
            UsageError: If it refuses a request, or a prefix leaves no room.
        """
        out: list[list[str]] = [["" for _ in job.rows] for job in jobs]
        tasks = iter(self._tasks(jobs, most, stop))
        running: dict[Future[tuple[str, int]], tuple[int, int]] = {}
        with ThreadPoolExecutor(self.concurrency) as pool:
            try:
                while True:
                    while len(running) < self.concurrency and (task := next(tasks, None)) is not None:
                        i, j, body = task
                        running[pool.submit(self._request, body, stop)] = (i, j)
                    if not running:
                        return out
                    done, _ = wait(running, return_when=FIRST_COMPLETED)
                    failed: BaseException | None = None
                    for future in done:
                        i, j = running.pop(future)
                        failed = future.exception() or failed
                        if future.exception() is None:
                            text, tokens = future.result()
                            self.meter.decoded += tokens
                            out[i][j] = text
                            if sink is not None:
                                sink(jobs[i], [jobs[i].rows[j]], [text])
                    if failed is not None:
                        raise failed
                    if self.max_tokens_total and self.meter.decoded >= self.max_tokens_total:
                        raise RunError(
                            f"server.max_tokens_total: {self.max_tokens_total} tokens are used up",
                            "what was drawn is kept; raise the limit and run again",
                        )
            except BaseException:
                for future in running:
                    future.cancel()
                raise

    def _tasks(self, jobs: Sequence[Job], most: int, stop: Sequence[str]) -> Iterator[tuple[int, int, dict[str, Any]]]:
        for i, job in enumerate(jobs):
            text = job.opened.prompt + job.opened.trace[: job.cut]
            room = self.policy.budget - self._prefix_tokens(job)
            if room < 1:
                raise UsageError(
                    f"trace {job.opened.key!r}: a prefix of {self.policy.budget - room} tokens with budget: "
                    f"{self.policy.budget}; accepted: a budget above the longest prefix"
                )
            keys = row_keys(self.policy.seed, job.opened.key, job.boundary, job.rows)
            for j, key in enumerate(keys.tolist()):
                body: dict[str, Any] = {
                    "prompt": text,
                    "max_tokens": min(room, most or room),
                    "temperature": self.policy.temperature,
                    "top_p": self.policy.top_p,
                    "seed": key % 2**31,
                }
                yield i, j, body | ({"stop": list(stop)} if stop else {})

    def _prefix_tokens(self, job: Job) -> int:
        """The server's count of the prefix' tokens, which also warms its cache."""
        if job.cut == 0:
            return 0
        prompt, whole = job.opened.prompt, job.opened.prompt + job.opened.trace[: job.cut]
        return max(self._count(whole) - self._count(prompt), 0)

    def _count(self, text: str) -> int:
        if text not in self._prompt_tokens:
            answer = self._post({"prompt": text, "max_tokens": 1, "temperature": 0.0}, _prompt_tokens)
            self._prompt_tokens[text] = answer
        return self._prompt_tokens[text]

    def _request(self, body: dict[str, Any], stop: Sequence[str]) -> tuple[str, int]:
        """Text of a completion and its number of tokens."""
        text, reason, tokens = self._post(body, _completion)
        if stop and reason == "stop":
            # the text that stopped it is left out by servers; one stop is put back, with several it is not known which
            return text + stop[0], tokens
        return text + (END if reason == "stop" else ""), tokens

    def _post(self, body: dict[str, Any], read: Callable[[Any], Any]) -> Any:
        """Make a request, again where that may help."""
        said = ""
        for attempt in range(self.retries + 1):
            if attempt:
                time.sleep(self.backoff * 2 ** (attempt - 1))
            try:
                return read(self._once(body))
            except _Busy as error:
                said = str(error)
        raise RunError(
            f"the server {self.url} failed {self.retries + 1} times: {said}",
            "what was drawn is kept; the same command goes on",
        )

    def _once(self, body: dict[str, Any]) -> Any:
        data = json.dumps({"model": self.model, **body}).encode()
        request = urllib.request.Request(f"{self.url}/completions", data, self._headers)
        try:
            with urllib.request.urlopen(request, timeout=self.timeout) as response:
                content = response.read()
        except urllib.error.HTTPError as error:
            text = error.read().decode(errors="replace")[:_SHOWN]
            if error.code in _TRANSIENT:
                raise _Busy(f"status {error.code}: {text}") from error
            raise UsageError(f"the server {self.url} refuses the request with status {error.code}: {text}") from error
        except (OSError, TimeoutError) as error:
            raise _Busy(f"no answer ({getattr(error, 'reason', error)})") from error
        try:
            return json.loads(content)
        except ValueError as error:
            raise _Busy(f"an answer that is no JSON: {content[:_SHOWN]!r}") from error


def _completion(answer: Any) -> tuple[str, str, int]:
    """Text, reason of the end and number of tokens in an answer."""
    try:
        choice = answer["choices"][0]
        text, reason = choice["text"], choice["finish_reason"]
        tokens = answer["usage"]["completion_tokens"]
    except (KeyError, IndexError, TypeError) as error:
        raise _Busy(f"an answer without choices[0].text, finish_reason and usage: {str(answer)[:_SHOWN]}") from error
    if not isinstance(text, str) or reason not in ("stop", "length") or not isinstance(tokens, int):
        raise _Busy(f"an answer of another form: {str(answer)[:_SHOWN]}")
    return text, reason, tokens


def _prompt_tokens(answer: Any) -> int:
    try:
        return int(answer["usage"]["prompt_tokens"])
    except (KeyError, TypeError, ValueError) as error:
        raise _Busy(f"an answer without usage.prompt_tokens: {str(answer)[:_SHOWN]}") from error
