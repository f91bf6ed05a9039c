"""Completions from an OpenAI-compatible server (vLLM, llama.cpp): bounded concurrency, retries, a limit on tokens.

One request for each completion, with a seed of its own; sharing prefixes is left to the server. Every completion is
handed on as soon as it is there; when one request fails for good, or the user stops the run, those under way are waited
for and handed on too, so that nothing that was answered is lost.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import threading
import urllib.error
import urllib.request
from collections.abc import Callable, Iterable, Iterator, Sequence
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
        max_tokens_total: Most tokens that the server may write for this engine, as far as its answers tell; 0 for no
            limit. No request is made that might exceed it.
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
        #: Tokens that the server has written, those of requests that only count a prefix included.
        self._written = 0
        #: Set when `complete` gives up: what is under way may end, but is not tried again.
        self._ending = threading.Event()

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
        tasks = self._tasks(jobs, most)
        running: dict[Future[tuple[str, int]], tuple[int, int, int]] = {}
        self._ending.clear()

        def keep(done: Iterable[Future[tuple[str, int]]]) -> None:
            """Hand on what was answered; only then raise what failed."""
            failed: BaseException | None = None
            for future in done:
                i, j, _ = running.pop(future)
                failed = future.exception() or failed
                if future.exception() is None:
                    text, tokens = future.result()
                    self.meter.decoded += tokens
                    self._written += tokens
                    out[i][j] = text
                    if sink is not None:
                        sink(jobs[i], [jobs[i].rows[j]], [text])
            if failed is not None:
                raise failed

        with ThreadPoolExecutor(self.concurrency) as pool:
            try:
                task = next(tasks, None)
                while task is not None or running:
                    while task is not None and len(running) < self.concurrency and self._affords(task[2], running):
                        i, j, body = task
                        running[pool.submit(self._request, body, stop)] = (i, j, body["max_tokens"])
                        task = next(tasks, None)
                    if not running:
                        raise RunError(
                            f"server.max_tokens_total: {self._written} of {self.max_tokens_total} tokens are used up, "
                            f"and the next completion may take {task[2]['max_tokens'] if task else 0}",
                            "what was drawn is kept; the same command goes on, with as many tokens again",
                        )
                    keep(wait(running, return_when=FIRST_COMPLETED).done)
            except BaseException:
                self._ending.set()
                for future in wait(running).done:
                    with contextlib.suppress(Exception):
                        keep([future])
                raise
        return out

    def _affords(self, body: dict[str, Any], running: dict[Any, tuple[int, int, int]]) -> bool:
        """Whether the limit on tokens holds even if this completion and those under way are as long as they may be."""
        under_way = sum(most for _, _, most in running.values())
        return not self.max_tokens_total or self._written + under_way + body["max_tokens"] <= self.max_tokens_total

    def _tasks(self, jobs: Sequence[Job], most: int) -> Iterator[tuple[int, int, dict[str, Any]]]:
        for i, job in enumerate(jobs):
            given = job.opened.trace[: job.cut]
            room = self.room(job.opened.prompt, given)
            if room < 1:
                raise UsageError(
                    f"trace {job.opened.key!r}: a prefix of {self.policy.budget - room} tokens with budget: "
                    f"{self.policy.budget}; accepted: a budget above the longest prefix"
                )
            keys = row_keys(self.policy.seed, job.opened.key, job.boundary, job.rows)
            for j, key in enumerate(keys.tolist()):
                body: dict[str, Any] = {
                    "prompt": job.opened.prompt + given,
                    "max_tokens": min(room, most or room),
                    "temperature": self.policy.temperature,
                    "top_p": self.policy.top_p,
                    "seed": key % 2**31,
                }
                yield i, j, body

    def room(self, prompt: str, given: str) -> int:
        """Tokens that the budget leaves, by the server's own count, which also warms its cache."""
        used = max(self._count(prompt + given) - self._count(prompt), 0) if given else 0
        return self.policy.budget - used

    def _count(self, text: str) -> int:
        if text not in self._prompt_tokens:
            answer = self._post({"prompt": text, "max_tokens": 1, "temperature": 0.0}, _prompt_tokens)
            self._written += 1
            self._prompt_tokens[text] = answer
        return self._prompt_tokens[text]

    def _request(self, body: dict[str, Any], stop: Sequence[str]) -> tuple[str, int]:
        """Text of a completion and its number of tokens."""
        text, reason, tokens = self._post(body, _completion)
        # cut here: a server that is told where to stop leaves that out and says "stop", as it does where a text ends
        ends = [text.index(word) + len(word) for word in stop if word in text]
        if ends:
            return text[: min(ends)], tokens
        return text + (END if reason == "stop" else ""), tokens

    def _post(self, body: dict[str, Any], read: Callable[[Any], Any]) -> Any:
        """Make a request, again where that may help."""
        said, failures = "", 0
        while failures <= self.retries and not (failures and self._ending.wait(self.backoff * 2 ** (failures - 1))):
            try:
                return read(self._once(body))
            except _Busy as error:
                said, failures = str(error), failures + 1
        raise RunError(
            f"the server {self.url} failed {failures} times: {said}",
            "what was drawn is kept; the same command goes on",
        )

    def _once(self, body: dict[str, Any]) -> Any:
        data = json.dumps({"model": self.model, **body}).encode()
        request = urllib.request.Request(f"{self.url}/completions", data, self._headers)
        try:
            with urllib.request.urlopen(request, timeout=self.timeout) as response:
                content = response.read()
        except urllib.error.HTTPError as error:
            text = _start_of(error)
            if error.code in _TRANSIENT:
                raise _Busy(f"status {error.code}: {text}") from error
            raise UsageError(f"the server {self.url} refuses the request with status {error.code}: {text}") from error
        except (OSError, http.client.HTTPException) as error:
            raise _Busy(f"no answer ({getattr(error, 'reason', error)})") from error
        try:
            return json.loads(content)
        except (ValueError, RecursionError) as error:
            raise _Busy(f"an answer that is no JSON: {content[:_SHOWN]!r}") from error


def _start_of(error: urllib.error.HTTPError) -> str:
    """What a refusal says, if it says it at all."""
    try:
        return error.read(4 * _SHOWN).decode(errors="replace")[:_SHOWN]
    except (OSError, http.client.HTTPException):
        return ""


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
