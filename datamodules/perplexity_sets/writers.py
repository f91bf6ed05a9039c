"""Language models that write paraphrases: one of `transformers` on this machine, or an OpenAI-compatible endpoint."""

from __future__ import annotations

import json
import os
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from typing import Any, Protocol
from urllib.parse import urlsplit


class Writer(Protocol):
    """Answers a prompt."""

    def __call__(self, prompt: str, count: int) -> list[str]:
        """Return `count` answers."""


class TransformersWriter:
    """A language model of `transformers`.

    Args:
        name: Path or name of the model.
        template: What a model without a chat template is given; `{prompt}` stands for the prompt.
        max_new_tokens: Most tokens of an answer.
        temperature: Of sampling.
        top_k: Tokens that are sampled from, 0 for all.
        top_p: Nucleus.
        seed: Seed of the sampling.
        device: Where it runs; None for the GPU if there is one.

    Departures:
        The released script asks for contrastive search (`penalty_alpha` 0.3) together with sampling; `transformers`
        then samples from the 25 likeliest tokens and does not use the penalty, which is what happens here.
    """

    def __init__(
        self,
        name: str,
        template: str = "USER: {prompt}\nASSISTANT:",
        max_new_tokens: int = 150,
        temperature: float = 1.0,
        top_k: int = 25,
        top_p: float = 1.0,
        seed: int = 0,
        device: str | None = None,
    ) -> None:
        import torch
        from transformers import AutoTokenizer

        from zoo.nn.lm import build_lm
        from zoo.nn.sampling import check_sampling

        check_sampling(temperature, top_k, top_p)
        if "{prompt}" not in template:
            raise ValueError("template: it lacks {prompt}, where the prompt goes")
        self.device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        self.model: Any = build_lm(name).to(self.device)  # type: ignore[arg-type]
        self.tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=False)
        self.template, self.max_new_tokens = template, max_new_tokens
        self.sampling: dict[str, Any] = {"temperature": temperature, "top_k": top_k, "top_p": top_p}
        self.generator = torch.Generator(self.device).manual_seed(seed)

    def __call__(self, prompt: str, count: int) -> list[str]:
        """Sample `count` answers in one batch."""
        import torch

        from zoo.nn.sampling import generate

        if self.tokenizer.chat_template:
            messages = [{"role": "user", "content": prompt}]
            text = str(self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))
            ids = self.tokenizer(text, add_special_tokens=False).input_ids
        else:
            ids = self.tokenizer(self.template.replace("{prompt}", prompt)).input_ids
        end = self.tokenizer.eos_token_id
        prompts = torch.tensor([ids] * count, device=self.device)
        written = generate(
            self.model,
            prompts,
            self.max_new_tokens,
            eos_id=end,
            pad_id=end or 0,
            generator=self.generator,
            **self.sampling,
        )
        rows = zip(written.tokens.tolist(), written.lengths.tolist(), strict=True)
        return [str(self.tokenizer.decode(row[:n], skip_special_tokens=True)) for row, n in rows]


class EndpointWriter:
    """An OpenAI-compatible endpoint: vLLM, llama.cpp, text-generation-inference and others.

    Args:
        url: Where it is, up to the version: `http://127.0.0.1:8000/v1`.
        model: Name of the model there.
        key_variable: Environment variable that holds its key; empty for none.
        max_new_tokens: Most tokens of an answer.
        temperature: Of sampling.
        top_p: Nucleus.
        top_k: Tokens that are sampled from; 0 leaves the field out, which not every server knows.
        seed: Seed of the first request; each has the next number.
        timeout: Seconds that an answer may take.
        tries: Requests until it is given up; a refusal (status 4xx but 408 and 429) is final at once.
        wait: Called with the seconds to wait before another try.

    Raises:
        ValueError: If the address is none of http or https, or the variable is not set.
    """

    def __init__(
        self,
        url: str,
        model: str,
        key_variable: str = "",
        max_new_tokens: int = 150,
        temperature: float = 1.0,
        top_p: float = 1.0,
        top_k: int = 25,
        seed: int = 0,
        timeout: float = 300.0,
        tries: int = 4,
        wait: Callable[[float], None] = time.sleep,
    ) -> None:
        if urlsplit(url).scheme not in ("http", "https") or not urlsplit(url).netloc:
            raise ValueError(f"endpoint: {url!r} is no address; accepted: http://host:port/v1")
        key = os.environ.get(key_variable, "")
        if key_variable and not key:
            raise ValueError(f"key_variable: the environment variable {key_variable} is not set")
        self.url = f"{url.rstrip('/')}/chat/completions"
        self.headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {key}"} if key else {})
        self.body: dict[str, Any] = {"model": model, "max_tokens": max_new_tokens, "temperature": temperature}
        self.body |= {"top_p": top_p} | ({"top_k": top_k} if top_k else {})
        self.seed, self.timeout, self.tries, self.wait = seed, timeout, tries, wait

    def __call__(self, prompt: str, count: int) -> list[str]:
        """Ask until there are `count` answers; some servers give one a request, whatever was asked for."""
        answers: list[str] = []
        while len(answers) < count:
            self.seed += 1
            messages = [{"role": "user", "content": prompt}]
            body = self.body | {"messages": messages, "n": count - len(answers), "seed": self.seed - 1}
            answers += self._answers(self._post(body))
        return answers[:count]

    def _post(self, body: dict[str, Any]) -> Any:
        request = urllib.request.Request(self.url, json.dumps(body).encode(), self.headers, method="POST")
        for number in range(self.tries):
            try:
                with urllib.request.urlopen(request, timeout=self.timeout) as answer:
                    return json.load(answer)
            except urllib.error.HTTPError as error:
                final = 400 <= error.code < 500 and error.code not in (408, 429)
                cause = f"status {error.code}"
                error.close()
                if final:
                    raise ValueError(f"endpoint: {self.url} answered with {cause}") from None
            except (OSError, json.JSONDecodeError) as error:
                cause = str(getattr(error, "reason", error))
            if number + 1 < self.tries:
                self.wait(2.0**number)
        raise ValueError(f"endpoint: {self.url} gave no answer in {self.tries} tries: {cause}")

    def _answers(self, answer: Any) -> list[str]:
        try:
            texts = [choice["message"]["content"] for choice in answer["choices"]]
        except (KeyError, TypeError) as error:
            raise ValueError(f"endpoint: {self.url} gave no chat completion") from error
        if not texts or not all(isinstance(text, str) for text in texts):
            raise ValueError(f"endpoint: {self.url} gave no text")
        return texts
