"""A branching modular chain: problems, a writer of chains of thought, and their exact potential by dynamic programming.

A problem is a start value and `n` operations modulo a prime `p`. The writer restates each operation and writes its
result; at *hard* steps it is right with probability `q` only (a planted insight), at others it goes astray with
probability `b` (a planted tangent) and comes back with probability `r`; with probability `g` it does not calculate at
all and guesses (a planted late guess). Since the rest of a trace depends on the current value alone, the probability
that it ends with the right answer follows from a backward recursion over steps and values.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

#: Words after the values, the two operations, `H` and the step words.
WORDS = ("TRY", "NO", "OK", "HMM", "ANS", "SOL", "SEP", "BOS", "EOS", "PAD")
#: Words of a chunk of filler before `SEP`, as many as a step has.
FILLER = 4


@dataclass(frozen=True)
class Writer:
    """How traces are written.

    Args:
        insight: Probability `q` of the right value at a hard step.
        tangent: Probability `b` of a tangent at another step.
        recover: Probability `r` that a tangent is taken back.
        guess: Probability `g` of filler and a guess instead of a calculation.

    Raises:
        ValueError: If one is no probability.
    """

    insight: float = 0.4
    tangent: float = 0.1
    recover: float = 0.5
    guess: float = 0.25

    def __post_init__(self) -> None:
        for key in ("insight", "tangent", "recover", "guess"):
            if not 0 <= getattr(self, key) <= 1:
                raise ValueError(f"{key}: {getattr(self, key)} is not accepted; accepted: a probability from 0 to 1")

    def sharpened(self, p: int, temperature: float, top_p: float) -> Writer:
        """The writer whose tokens are drawn with a temperature, then from the most likely `top_p` of the mass.

        Choices among equally likely wrong values stay uniform over those that are kept.
        """
        if temperature == 1 and top_p == 1:
            return self

        def share(first: float, others: int, rest: float) -> float:
            """New probability of the first alternative beside `others` equal ones that share `rest`."""
            logs = [math.log(first) if first else -math.inf] + [math.log(rest / others) if rest else -math.inf] * others
            weights = np.exp((np.array(logs) - max(logs)) / max(temperature, 1e-9))
            weights /= weights.sum()
            order = np.argsort(-weights, kind="stable")
            before = np.cumsum(weights[order]) - weights[order]
            kept = np.zeros_like(weights)
            kept[order[before < top_p]] = weights[order[before < top_p]]
            return float(kept[0] / kept.sum())

        return Writer(
            share(self.insight, p - 1, 1 - self.insight),
            1 - share(1 - self.tangent, 1, self.tangent),
            share(self.recover, 1, 1 - self.recover),
            share(self.guess, 1, 1 - self.guess),
        )


@dataclass(frozen=True)
class Written:
    """A trace as its writer made it.

    Attributes:
        tokens: Token ids.
        choices: Where the value of a step is written for the first time: position in `tokens`, the right value, and
            whether the step is hard.
        logprob: Log-probability of the trace under its writer, in nats.
    """

    tokens: list[int]
    choices: list[tuple[int, int, bool]]
    logprob: float


@dataclass(frozen=True)
class Chunk:
    """A chunk of a trace, read back.

    Attributes:
        end: Position after its last token.
        kind: `step`, `hard`, `try`, `no`, `ok`, `redo`, `hmm`, `answer` or `broken`.
        potential: Exact probability of a right answer after it; NaN once the trace has left the grammar.
    """

    end: int
    kind: str
    potential: float


@dataclass(frozen=True)
class ChainTask:
    """The grammar.

    Args:
        p: The prime; values are `0 .. p - 1`.
        steps: Number of operations `n`.
        hard: Steps, counted from 1, whose operation is `f(v, k) = v k + v^2 + 1`.
        operands: Least and largest operand.

    Raises:
        ValueError: If a value is out of range.
    """

    p: int = 31
    steps: int = 5
    hard: tuple[int, ...] = (2,)
    operands: tuple[int, int] = (1, 2)

    def __post_init__(self) -> None:
        if self.p < 3 or any(self.p % d == 0 for d in range(2, math.isqrt(self.p) + 1)):
            raise ValueError(f"p: {self.p} is not accepted; accepted: a prime of at least 3")
        if self.steps < 1:
            raise ValueError(f"steps: {self.steps} is not accepted; accepted: 1 or more")
        if any(not 1 <= h <= self.steps for h in self.hard):
            raise ValueError(f"hard: {list(self.hard)} is not accepted; accepted: steps from 1 to {self.steps}")
        if len(self.operands) != 2 or not 1 <= self.operands[0] <= self.operands[1] < self.p:
            raise ValueError(
                f"operands: {list(self.operands)} is not accepted; accepted: least and largest, from 1 to {self.p - 1}"
            )

    @cached_property
    def words(self) -> list[str]:
        """The vocabulary in the order of its ids; a value is its own id."""
        return [*map(str, range(self.p)), "+", "*", "H", *(f"S{i}" for i in range(1, self.steps + 1)), *WORDS]

    @cached_property
    def ids(self) -> dict[str, int]:
        """Ids of the words."""
        return {word: index for index, word in enumerate(self.words)}

    @property
    def longest(self) -> int:
        """Tokens of the longest prompt and trace together."""
        return self.prompt_length + 13 * self.steps + 3

    @property
    def prompt_length(self) -> int:
        """Tokens of a prompt."""
        return 2 * self.steps + 3

    def successor(self, step: int, value: int, op: str, k: int) -> int:
        """Value after `step` (from 1)."""
        if step in self.hard:
            return (value * k + value * value + 1) % self.p
        return (value + k) % self.p if op == "+" else value * k % self.p


@dataclass(frozen=True)
class ChainProblem:
    """One problem: it knows its prompt, judges and reads traces, and writes them.

    Args:
        task: The grammar.
        start: The start value.
        ops: Operation (`+`, `*` or `H`) and operand of each step.
        writer: The writer that exact potentials are of.
        key: Name of the problem.
    """

    task: ChainTask
    start: int
    ops: tuple[tuple[str, int], ...]
    writer: Writer
    key: str = "0"
    joint: ClassVar[str] = " "

    @property
    def prompt(self) -> list[int]:
        """Token ids of the question."""
        ids = self.task.ids
        return [ids["BOS"], self.start, *(x for op, k in self.ops for x in (ids[op], k)), ids["SOL"]]

    @property
    def answer(self) -> int:
        """The right answer."""
        value = self.start
        for step, (op, k) in enumerate(self.ops, 1):
            value = self.task.successor(step, value, op, k)
        return value

    @property
    def forced_answer(self) -> tuple[list[int], list[int]]:
        """Tokens that ask for the answer, and the right one."""
        return [self.task.ids["ANS"]], [self.answer]

    def values(self) -> NDArray[np.float64]:
        """Probability of a right answer after step `i` with value `v` on the page, `[n + 1, p]`."""
        return _values(self.task, self.ops, self.answer, self.writer)

    def judge(self, trace: Sequence[int]) -> bool:
        """Whether a trace ends with the right answer; one without an end has none."""
        ids = self.task.ids
        return len(trace) >= 3 and list(trace[-3:]) == [ids["ANS"], self.answer, ids["EOS"]]

    def ended(self, trace: Sequence[int]) -> bool:
        """Whether a trace has its end."""
        return len(trace) > 0 and trace[-1] == self.task.ids["EOS"]

    def pieces(self, trace: Sequence[int]) -> list[str]:
        """The words of a trace."""
        return [self.task.words[token] for token in trace]

    def text(self, tokens: Sequence[int]) -> str:
        """A trace in words."""
        return " ".join(self.pieces(tokens)).replace("SEP ", "\n")

    def answer_start(self, trace: Sequence[int]) -> int:
        """Where the answer begins: the last `ANS`, or the end if there is none."""
        where = [index for index, token in enumerate(trace) if token == self.task.ids["ANS"]]
        return where[-1] if where else len(trace)

    def annotate(self, trace: Sequence[int], boundaries: Sequence[int]) -> tuple[list[str], list[float]]:
        """Read chunks back.

        Args:
            trace: Token ids.
            boundaries: Positions `0 = t_0 <= .. <= t_K = len(trace)`.

        Returns:
            The kind of each of the `K` chunks (that of the grammar's chunk that ends there; empty where none does),
            and the exact potential at each of the `K + 1` positions (NaN where the grammar has none).
        """
        ends = {chunk.end: chunk for chunk in self.read(trace)}
        exact = {0: self.potential} | {end: chunk.potential for end, chunk in ends.items()}
        kinds = [ends[end].kind if end in ends else "" for end in boundaries[1:]]
        return kinds, [exact.get(position, math.nan) for position in boundaries]

    @property
    def potential(self) -> float:
        """Probability of a right answer before anything is written."""
        g = self.writer.guess
        return g / self.task.p + (1 - g) * float(self.values()[0, self.start])

    def read(self, trace: Sequence[int]) -> Iterator[Chunk]:
        """Yield the chunks of a trace with their kinds and exact potentials."""
        task, ids, table = self.task, self.task.ids, self.values()
        sep, r = ids["SEP"], self.writer.recover
        step, value, tried, mode = 0, self.start, -1, ""
        begin = 0
        while begin < len(trace):
            end = begin
            while end < len(trace) and trace[end] not in (sep, ids["EOS"]):
                end += 1
            if end == len(trace):
                yield Chunk(end, "broken", math.nan)
                return
            body, last, begin, end = list(trace[begin:end]), trace[end], end + 1, end + 1
            op, k = self.ops[min(step, task.steps - 1)]
            head = [ids.get(f"S{step + 1}", -1), ids[op], k]
            right = task.successor(step + 1, value, op, k) if step < task.steps else -1
            kind, potential = "broken", math.nan
            if last == ids["EOS"]:
                if (
                    len(body) == 2
                    and body[0] == ids["ANS"]
                    and body[1] < task.p
                    and (step == task.steps or mode == "hmm")
                ):
                    kind, potential = "answer", float(body[1] == self.answer)
            elif mode in ("", "hmm") and step == 0 and body == [ids["HMM"]] * FILLER:
                mode, kind, potential = "hmm", "hmm", 1 / task.p
            elif mode == "hmm" or step >= task.steps:
                pass
            elif mode == "try" and body in ([ids["NO"]], [ids["OK"]]):
                kind = "no" if body == [ids["NO"]] else "ok"
                value, step, mode = (value, step, "no") if kind == "no" else (tried, step + 1, "")
                potential = float(table[step + 1, right] if kind == "no" else table[step, value])
            elif mode == "try" or body[:3] != head:
                pass
            elif len(body) == 4 and body[3] < task.p:
                kind = "redo" if mode == "no" else "hard" if step + 1 in task.hard else "step"
                value, step, mode = body[3], step + 1, ""
                potential = float(table[step, value])
            elif mode == "" and len(body) == 5 and body[3] == ids["TRY"] and body[4] < task.p:
                tried, mode, kind = body[4], "try", "try"
                potential = float(r * table[step + 1, right] + (1 - r) * table[step + 1, tried])
            yield Chunk(end, kind, potential)
            if kind == "broken":
                return

    def write(self, coins: Iterator[float], writer: Writer | None = None) -> Written:
        """Write a trace.

        Args:
            coins: Uniform random numbers in `[0, 1)`; at most `3 n + 2` are used.
            writer: Another writer than the problem's own.
        """
        task, ids, p = self.task, self.task.ids, self.task.p
        who = writer or self.writer
        sep, value = ids["SEP"], self.start
        tokens: list[int] = []
        choices: list[tuple[int, int, bool]] = []
        logprob = 0.0

        def happens(probability: float) -> bool:
            nonlocal logprob
            yes = next(coins) < probability
            logprob += math.log(probability if yes else 1 - probability)
            return yes

        def other(right: int) -> int:
            nonlocal logprob
            logprob -= math.log(p - 1)
            return (right + 1 + int(next(coins) * (p - 1))) % p

        if happens(who.guess):
            logprob -= math.log(p)
            chunk = [ids["HMM"]] * FILLER + [sep]
            return Written([*chunk * task.steps, ids["ANS"], int(next(coins) * p), ids["EOS"]], [], logprob)
        for step, (op, k) in enumerate(self.ops, 1):
            head, right, hard = [ids[f"S{step}"], ids[op], k], task.successor(step, value, op, k), step in task.hard
            choices.append((len(tokens) + 3, right, hard))
            if hard:
                value = right if happens(who.insight) else other(right)
            elif happens(who.tangent):
                wrong = other(right)
                tokens += [*head, ids["TRY"], wrong, sep]
                if not happens(who.recover):
                    tokens += [ids["OK"], sep]
                    value = wrong
                    continue
                tokens += [ids["NO"], sep]
                value = right
            else:
                value = right
            tokens += [*head, value, sep]
        return Written([*tokens, ids["ANS"], value, ids["EOS"]], choices, logprob)


@lru_cache(maxsize=4096)
def _values(task: ChainTask, ops: tuple[tuple[str, int], ...], answer: int, writer: Writer) -> NDArray[np.float64]:
    """Backward recursion; see `ChainProblem.values`."""
    p, v = task.p, np.arange(task.p)
    table = np.zeros((task.steps + 1, p))
    table[-1, answer] = 1
    for step in range(task.steps, 0, -1):
        op, k = ops[step - 1]
        following = table[step]
        right = following[np.array([task.successor(step, int(x), op, k) for x in v])]
        wrong = (following.sum() - right) / (p - 1)
        if step in task.hard:
            table[step - 1] = writer.insight * right + (1 - writer.insight) * wrong
        else:
            b, r = writer.tangent, writer.recover
            table[step - 1] = (1 - b) * right + b * (r * right + (1 - r) * wrong)
    table.setflags(write=False)
    return table


def draw_problem(task: ChainTask, writer: Writer, coins: Iterator[float], key: str = "0") -> ChainProblem:
    """Draw a problem from `2 n + 1` uniform random numbers."""
    low, high = task.operands
    start, ops = int(next(coins) * task.p), []
    for step in range(1, task.steps + 1):
        op, k = "+*"[int(next(coins) * 2)], low + int(next(coins) * (high - low + 1))
        ops.append(("H" if step in task.hard else op, k))
    return ChainProblem(task, start, tuple(ops), writer, key)


def read_problem(task: ChainTask, writer: Writer, prompt: Sequence[int], key: str = "0") -> ChainProblem:
    """Read a prompt back.

    Raises:
        ValueError: If it is no prompt of this task.
    """
    words: list[Any] = [task.words[t] if 0 <= t < len(task.words) else "?" for t in prompt]
    body, ops = words[2:-1], []
    fits = len(words) == task.prompt_length and words[0] == "BOS" and words[-1] == "SOL" and words[1].isdigit()
    if fits:
        for step, (op, k) in enumerate(zip(body[::2], body[1::2], strict=True), 1):
            fits = fits and k.isdigit() and op in (("H",) if step in task.hard else ("+", "*"))
            ops.append((op, int(k) if k.isdigit() else 0))
    if not fits:
        raise ValueError(
            f"problem {key!r}: {' '.join(words[:12])!r} is no prompt of this task; accepted: BOS, a value, "
            f"{task.steps} operations with their operands, SOL"
        )
    return ChainProblem(task, int(words[1]), tuple(ops), writer, key)
