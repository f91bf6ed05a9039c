"""Real problems with reference answers, as texts: from JSONL, CHAMP, or data sets in the format of `datasets`."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

from datamodules.loading import ResumableLoader, keyed_generator
from datamodules.reasoning_answers import (
    FORMS,
    answer_span,
    as_integer,
    check_answer,
    extract_answer,
    plain_references,
    run_tests,
)
from datamodules.reasoning_chain import ItemBatches, ReasoningData
from datamodules.reasoning_sources import SOURCES, read_lines, read_source

#: Fields that name a problem, where there is one of them; else its number does.
_KEYS = ("key", "id", "task_id", "unique_id", "Record ID")
#: Ends a text that a server has ended; see `zoo.methods.cot_potential.server.END`.
END = "\x03"
_TEMPLATE = "{question}\nPlease reason step by step, and put your final answer within \\boxed{{}}.\n"
_CODE_TEMPLATE = "{question}\nWrite the whole function in one Python code block.\n"


@dataclass(frozen=True)
class TextProblem:
    """A problem in words; traces are token ids if there is a tokenizer, and text if not.

    Args:
        key: Name.
        question: The question as the model reads it, template and all.
        reference: The right answer; for `code` its tests.
        form: One of `FORMS`.
        tokenizer: A tokenizer of `transformers`, or None for the texts of a server.
        program: What stands before a model's program (`code`), such as imports.
        others: Further forms of the right answer.
        scorer: Judges an answer instead of the reference; 1 is right.
    """

    key: str
    question: str
    reference: str
    form: str
    tokenizer: Any = field(default=None, compare=False)
    program: str = ""
    others: tuple[str, ...] = ()
    scorer: Callable[[str], float] | None = field(default=None, compare=False)
    joint: ClassVar[str] = ""

    @cached_property
    def prompt(self) -> Any:
        """The question."""
        return self.question if self.tokenizer is None else self.tokenizer(self.question)["input_ids"]

    @property
    def _end(self) -> Any:
        return END if self.tokenizer is None else [self.tokenizer.eos_token_id]

    def encode(self, text: str, where: str) -> Any:
        """Turn a given trace into what the model has written, its end included.

        Raises:
            ValueError: If the tokens do not give the text back.
        """
        if self.tokenizer is None:
            return text + END
        ids = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        again = self._decode(ids)
        if again != text:
            at = next(
                (i for i, (a, b) in enumerate(zip(text, again, strict=False)) if a != b), min(len(text), len(again))
            )
            raise ValueError(
                f"{where}: the tokenizer does not give the text back: {text[at : at + 20]!r} became "
                f"{again[at : at + 20]!r}; accepted: texts that it can represent"
            )
        return [*ids, *self._end]

    def _decode(self, ids: Sequence[int]) -> str:
        return self.tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)

    def _body(self, trace: Any) -> Any:
        """A trace without its end."""
        return trace[:-1] if self.ended(trace) else trace

    def ended(self, trace: Any) -> bool:
        """Whether the model, or a server for it, has ended the trace."""
        return bool(len(trace)) and trace[-1:] == self._end

    def judge(self, trace: Any) -> bool:
        """Whether a trace that has ended gives the right answer."""
        if not self.ended(trace):
            return False
        text = self.text(trace)
        if self.scorer is None and self.form != "code":
            return any(check_answer(text, reference, self.form) for reference in (self.reference, *self.others))
        given = extract_answer(text, self.form)
        if self.scorer is not None:
            return given is not None and self.scorer(given) >= 1
        return given is not None and run_tests(f"{self.program}{given}", self.reference)

    def text(self, tokens: Any) -> str:
        """A trace as text, without its end."""
        body = self._body(tokens)
        return body if self.tokenizer is None else self._decode(body)

    def pieces(self, trace: Any) -> list[str]:
        """Text of each token, or the characters."""
        if self.tokenizer is None:
            return [("" if c == END else c) for c in trace]
        end = self.tokenizer.eos_token_id
        return ["" if token == end else self._decode([token]) for token in trace]

    def answer_start(self, trace: Any) -> int:
        """Position of the token that the answer begins in."""
        span = answer_span(self.text(trace), self.form)
        if span is None:
            return len(trace)
        if self.tokenizer is None:
            return span[0]
        low, high = 0, len(self._body(trace))
        while low < high:  # the most tokens that end before the answer
            middle = (low + high + 1) // 2
            low, high = (middle, high) if len(self._decode(trace[:middle])) <= span[0] else (low, middle - 1)
        return low

    def annotate(self, trace: Any, boundaries: Sequence[int]) -> tuple[list[str], list[float]]:
        """Nobody has planted anything, and nobody knows the exact potential."""
        return [""] * (len(boundaries) - 1), [math.nan] * len(boundaries)


class ReasoningProblems(ReasoningData):
    """Problems of a file or a data set, with given traces or without.

    Args:
        source: `jsonl` (lines with `question` and `answer`), `champ` (the package `champ-dataset`), `aime`, `math500`,
            `gpqa`, `humaneval` in the format of their data sets, or `reasoning_gym` (the package; `path` is the task).
        path: The JSONL or Parquet file; empty for the package, or for the data set on the hub.
        tokenizer: Path or name of the model's tokenizer; empty for a server, which gets texts.
        form: `integer`, `math`, `choice` or `code`; empty for what goes with the source.
        template: What the model reads, with `{question}`; empty for a usual one. A chat model's own template goes here.
        traces: JSONL file of traces, lines with `key` and `trace`, or the `analysis/curves.jsonl` of another model's
            run; problems without one are left out. Empty for traces that the model writes itself. Needed by `predict`.
        run_code: Whether programs of the model are run, see `datamodules.reasoning_answers.run_tests`.
        num_problems: Problems that are read; 0 for all.
        problem_batch: Problems that are analysed together.
        num_workers: Loader processes.
        data_seed: Seed of the order of choices (`gpqa`) and of generated problems (`reasoning_gym`).

    Raises:
        ValueError: If a value is out of range or two do not go together.
    """

    def __init__(
        self,
        source: str = "jsonl",
        path: str = "",
        tokenizer: str = "",
        form: str = "",
        template: str = "",
        traces: str = "",
        run_code: bool = False,
        num_problems: int = 0,
        problem_batch: int = 8,
        num_workers: int = 0,
        data_seed: int = 0,
    ) -> None:
        super().__init__(num_workers, data_seed)
        if source not in SOURCES:
            raise ValueError(f"source: {source!r} is not accepted; accepted: {', '.join(SOURCES)}")
        if form and form not in FORMS:
            raise ValueError(f"form: {form!r} is not accepted; accepted: {', '.join(FORMS)}")
        if template and "{question}" not in template:
            raise ValueError(f"template: {template!r} has no {{question}}")
        if source in ("jsonl", "reasoning_gym") and not path:
            raise ValueError(f"path: empty with source: {source}; accepted: a JSONL file, or the name of a task")
        if problem_batch < 1 or num_problems < 0:
            raise ValueError(f"problem_batch, num_problems: {problem_batch}, {num_problems} are not accepted")
        self.source, self.path, self.tokenizer_name, self.form = source, path, tokenizer, form
        self.template, self.traces_file, self.run_code = template, traces, run_code
        self.num_problems, self.problem_batch = num_problems, problem_batch

    @cached_property
    def tokenizer(self) -> Any:
        """The tokenizer, or None."""
        if not self.tokenizer_name:
            return None
        from transformers import AutoTokenizer

        try:
            return AutoTokenizer.from_pretrained(self.tokenizer_name, trust_remote_code=False)
        except (OSError, ValueError) as error:
            said = str(error).splitlines()[0]
            raise ValueError(f"tokenizer: {self.tokenizer_name!r} cannot be loaded: {said}") from error

    @property
    def vocab_size(self) -> int:
        """Number of tokens; 0 without a tokenizer."""
        return 0 if self.tokenizer is None else len(self.tokenizer)

    @property
    def eos_id(self) -> int:
        """Token that ends a text; 0 without a tokenizer.

        Raises:
            ValueError: If the tokenizer has none.
        """
        if self.tokenizer is None:
            return 0
        if self.tokenizer.eos_token_id is None:
            raise ValueError(f"tokenizer: {self.tokenizer_name!r} has no token that ends a text")
        return int(self.tokenizer.eos_token_id)

    @cached_property
    def problems(self) -> list[TextProblem]:
        """The problems.

        Raises:
            FileNotFoundError: If the file is not there.
            ModuleNotFoundError: If the package is not installed, with the way to get it.
            ValueError: If a problem has no question or no reference answer.
        """
        rows = read_source(self.source, self.path, self.num_problems, self.data_seed)
        found = [self._problem(number, row) for number, row in enumerate(rows, 1)]
        keys = [problem.key for problem in found]
        if len(set(keys)) < len(keys):
            twice = next(key for key in keys if keys.count(key) > 1)
            raise ValueError(f"{self.path or self.source}: two problems have the key {twice!r}")
        return found

    def _problem(self, number: int, row: dict[str, Any]) -> TextProblem:
        source = SOURCES[self.source]
        key = str(next((row[name] for name in _KEYS if row.get(name) is not None), number))
        question, reference = row.get(source.question), row.get(source.answer)
        for name, value in ((source.question, question), (source.answer, reference)):
            if value is None or not str(value).strip():
                what = "question" if name == source.question else "reference answer"
                raise ValueError(f"problem {key!r} of {self.path or self.source} has no {what} (field {name!r})")
        others: list[str] = []
        if self.source == "champ":
            reference, *others = plain_references(str(reference))
        form = self.form or source.form or ("math" if as_integer(str(reference)) is None else "integer")
        program = ""
        if self.source == "gpqa":
            question, reference = self._choices(str(question), row, number)
        if form == "code":
            if not self.run_code:
                raise ValueError("run_code: false, but the answers are programs; true runs what the model writes")
            # the model writes the whole function; imports and helpers stand before it in the question
            name = row["entry_point"]
            program, reference = str(question).partition(f"def {name}(")[0], f"{reference}\ncheck({name})\n"
        template = self.template or (_CODE_TEMPLATE if form == "code" else _TEMPLATE)
        asked = template.format(question=question)
        return TextProblem(key, asked, str(reference), form, self.tokenizer, program, tuple(others), row.get("scorer"))

    def _choices(self, question: str, row: dict[str, Any], number: int) -> tuple[str, str]:
        """Question with its choices in an order of the seed, and the letter of the right one."""
        import torch

        texts = [row["Correct Answer"], *(row[f"Incorrect Answer {i}"] for i in (1, 2, 3))]
        order = torch.randperm(4, generator=keyed_generator(self.data_seed, "choices", number)).tolist()
        lines = [f"({letter}) {str(texts[i]).strip()}" for letter, i in zip("ABCD", order, strict=True)]
        return "\n".join([question, *lines]), "ABCD"[order.index(0)]

    @cached_property
    def traces(self) -> list[list[Any]]:
        """Given traces of each problem.

        Raises:
            FileNotFoundError: If the file is not there.
            ValueError: If a line has no trace, names no problem, or its text is not given back by the tokenizer.
        """
        out: dict[str, list[Any]] = {problem.key: [] for problem in self.problems}
        if self.traces_file:
            by_key = {problem.key: problem for problem in self.problems}
            for place, row in read_lines(Path(self.traces_file).expanduser()):
                key, text = str(row.get("problem", row.get("key", ""))), row.get("trace", row.get("text"))
                if key not in by_key or not isinstance(text, str) or not text:
                    raise ValueError(
                        f"{place}: accepted: a line with the key of a problem and a trace; got key {key!r}"
                    )
                out[key].append(by_key[key].encode(text, place))
        return [out[problem.key] for problem in self.problems]

    def setup(self, stage: str) -> None:
        """Read problems and traces.

        Raises:
            ValueError: If there is nothing to predict.
        """
        if stage == "fit":
            raise ValueError("reasoning_problems has no traces to train on; accepted: test and predict")
        if not any(self.traces) and (stage == "predict" or self.traces_file):
            said = (
                f"{self.traces_file!r} has no traces"
                if self.traces_file
                else "empty; predict needs a JSONL file of traces"
            )
            raise ValueError(f"traces: {said}")

    def test_dataloader(self) -> ResumableLoader:
        """All problems, for which the model writes traces; with a file of traces, those that it has traces of."""
        if self.traces_file:
            return self.predict_dataloader()
        return self.loader(ItemBatches(list(self.problems), self.traces, self.problem_batch), same_every_epoch=True)

    def predict_dataloader(self) -> ResumableLoader:
        """Problems that have traces."""
        chosen = [(p, t) for p, t in zip(self.problems, self.traces, strict=True) if t]
        batches = ItemBatches([p for p, _ in chosen], [t for _, t in chosen], self.problem_batch)
        return self.loader(batches, same_every_epoch=True)
