"""Reading answers out of texts, and comparing them: numbers, LaTeX, letters, and programs where that is asked for."""

from __future__ import annotations

import contextlib
import os
import re
import sys
from collections.abc import Callable
from functools import lru_cache
from typing import Any

#: Forms of an answer.
FORMS = ("integer", "math", "choice", "code")
#: What stands before an answer, besides `\boxed`.
_MARKER = re.compile(r"(?:####|(?:final\s+)?answer\s*(?:is\b|:|=)+)[\s*$:]*", re.IGNORECASE)
_INTEGER = re.compile(r"[-+]?\d[\d,]*(?![\d.]*\d)")
#: Where the letter of a choice stands, the surest place first: alone, at the beginning before a bracket or the like, in
#: brackets, anywhere as a capital that is no word (`A circle`, `I think`).
_LETTERS = (
    re.compile(r"^\W*([A-Ja-j])\W*$"),
    re.compile(r"^\W*([A-J])\s*[).:,;\]]"),
    re.compile(r"[(\[{]\s*([A-Ja-j])\s*[)\]}]"),
    re.compile(r"\b([B-HJ])\b|\b([AI])\b(?!\s+[a-z])"),
)
_FENCE = re.compile(r"```(?:python|py)?[ \t]*\n(.*?)```", re.DOTALL)


def answer_span(text: str, form: str) -> tuple[int, int] | None:
    """Find where the answer is written: the last `\\boxed{..}`, else what follows the last marker.

    Markers are `####`, `answer:` and `the answer is`. Without either, a number at the end counts for `integer`; a
    fenced block, or else the whole text, for `code`. None if there is no answer.

    Args:
        text: The text.
        form: One of `FORMS`.

    Returns:
        Start (of the box or the marker) and end.
    """
    if form == "code":
        blocks = list(_FENCE.finditer(text))
        return blocks[-1].span() if blocks else ((0, len(text)) if text.strip() else None)
    box = _last_box(text)
    if box is not None:
        return box
    markers = list(_MARKER.finditer(text))
    if markers:
        start = markers[-1].start()
        line = text.find("\n", markers[-1].end())
        end = len(text) if line < 0 else line
        return (start, end) if text[markers[-1].end() : end].strip() else None
    numbers = list(_INTEGER.finditer(text)) if form == "integer" else []
    if numbers and not text[numbers[-1].end() :].strip(" \n.$*"):
        return numbers[-1].span()
    return None


def _last_box(text: str) -> tuple[int, int] | None:
    """Span of the last box whose braces are closed."""
    for start in reversed([m.start() for m in re.finditer(r"\\(?:boxed|fbox)\s*\{", text)]):
        depth = 0
        for i in range(text.index("{", start), len(text)):
            depth += {"{": 1, "}": -1}.get(text[i], 0)
            if depth == 0:
                return start, i + 1
    return None


def extract_answer(text: str, form: str) -> str | None:
    """Return the answer that a text gives, or None.

    Args:
        text: The text.
        form: One of `FORMS`.
    """
    span = answer_span(text, form)
    if span is None:
        return None
    answer = text[span[0] : span[1]]
    if form == "code":
        fenced = _FENCE.fullmatch(answer)
        return fenced.group(1) if fenced else answer
    if answer.startswith("\\"):
        return answer[answer.index("{") + 1 : -1].strip()
    return _MARKER.sub("", answer, count=1).strip(" \n*").rstrip(" \n.*")


def as_integer(text: str) -> int | None:
    """Read a text that is a whole number, with separators, signs, dollars and leading zeros; None for anything else."""
    plain = text.strip().strip("$").replace(",", "").replace("\\!", "").replace(" ", "").rstrip(".")
    return int(plain) if re.fullmatch(r"[-+]?\d{1,4000}", plain) else None


def read_letter(answer: str) -> str | None:
    """Read the letter of a choice, A to J, out of an answer; None if there is none.

    `(b)`, `B.`, `\\text{B}`, `B) because of D` and `option B` are B; `A circle`, `none of them` are none.
    """
    for pattern in _LETTERS:
        found = pattern.search(answer)
        if found:
            return next(letter for letter in found.groups() if letter).upper()
    return None


@lru_cache(maxsize=65536)
def check_answer(text: str, reference: str, form: str) -> bool:
    """Whether a text gives the right answer; one without an answer does not.

    Args:
        text: What was written.
        reference: The right answer: a number, LaTeX, or a letter.
        form: `integer`, `math` or `choice`; programs go to `run_tests`.

    Raises:
        ModuleNotFoundError: If an answer that is not a whole number is to be compared without `math-verify`.
    """
    given = extract_answer(text, form)
    if given is None:
        return False
    if form == "choice":
        return read_letter(given) == reference.strip().strip("()").upper()
    mine, right = as_integer(given), as_integer(reference)
    if mine is not None and right is not None:
        return mine == right
    if form == "integer":
        return False
    parse, verify = math_verify()
    return bool(verify(parse(f"${reference.strip().strip('$')}$"), parse(f"${given.strip().strip('$')}$")))


#: Words around a value, as the references of CHAMP have them.
_BEFORE = re.compile(
    r"^(?:The only possible value for the limit is|The limit exists and is equal to|At (?:least|most)|Exactly)\s+"
)
_AFTER = re.compile(
    r"^(\S+)\s+(?:is the only possible value|(?:(?:integer-valued|real-valued)\s+)?"
    r"(?:pairs?|roots?|zeros?|values?|numbers?|inequalities|sequences?|times))$"
)
_OTHERWISE = re.compile(r",?\s+or (?:equivalently|an equivalent form such as|approximately)\s+")
_CHOOSE = re.compile(r"\bC\(([^(),]+),\s*([^(),]+)\)")


def plain_references(text: str) -> list[str]:
    """Read a reference answer that is written for people: the values in it, each as good as the others.

    `100 (i.e., all numbers)` is 100, `2*C(10, 5), or equivalently 504` has two forms, `-3 is the only possible value`
    is -3. An approximation is none of the values; what is all words stays as it is.
    """
    text = re.sub(r"\s+\((?:i\.e\.|no |none ).*$", "", text.strip().replace("\N{MINUS SIGN}", "-"))
    parts = _OTHERWISE.split(text)
    if "approximately" in text:
        parts = parts[:1]
    out = []
    for part in parts:
        value = _AFTER.sub(r"\1", _BEFORE.sub("", part)).strip()
        out.append(_CHOOSE.sub(r"\\binom{\1}{\2}", {"one": "1"}.get(value, value)))
    return list(dict.fromkeys(out))


def math_verify() -> tuple[Callable[[str], Any], Callable[[Any, Any], bool]]:
    """Parser and comparison of `math-verify`; a comparison that takes long counts as different.

    Raises:
        ModuleNotFoundError: If it is not installed, with the way to get it.
    """
    try:
        import math_verify as library
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "answers that are not whole numbers are compared by math-verify: pip install 'method-zoo[math]'"
        ) from error
    return library.parse, library.verify


#: Limits of a program: seconds, bytes of memory, bytes of a file.
_LIMITS = (5, 1 << 30, 1 << 20)
#: Where the system allows it, the process leaves the network (CLONE_NEWUSER | CLONE_NEWNET); then come the limits. The
#: last word is only said if program and tests ran to their end: `exit()` in a program is no success.
_PRELUDE = """
import ctypes, os, resource, sys
ctypes.CDLL(None).unshare(0x10000000 | 0x40000000) if sys.platform == "linux" else None
seconds, memory, size = {limits}
resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds))
resource.setrlimit(resource.RLIMIT_AS, (memory, memory))
resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))
resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
resource.setrlimit(resource.RLIMIT_NPROC, (0, 0))
exec(compile(sys.stdin.read(), "program", "exec"), {{"__name__": "program"}})
os.write({pipe}, {word!r})
"""


def run_tests(program: str, tests: str, timeout: float = 10.0) -> bool:
    """Run a program with its tests in a process of its own and return whether all of it ran without an error.

    The process has no environment, an empty folder of its own, limits of time, memory and file size, no children of
    its own (unless it runs as root) and, where the system allows it, no network. What it starts is ended with it, and
    what it prints is dropped. That keeps mistakes away, not malice: it can read files. Run programs of a model inside
    a container.

    Args:
        program: Source text.
        tests: Source text that raises if the program is wrong.
        timeout: Seconds of the wall clock.
    """
    import secrets
    import signal
    import subprocess
    import tempfile

    word = secrets.token_bytes(16)
    out, into = os.pipe()
    os.set_blocking(out, False)
    source = f"{program}\n{tests}\n".encode(errors="replace")
    try:
        with tempfile.TemporaryDirectory() as folder, subprocess.Popen(
            [sys.executable, "-I", "-S", "-c", _PRELUDE.format(limits=_LIMITS, pipe=into, word=word)],
            cwd=folder, env={}, pass_fds=(into,), start_new_session=True,
            stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        ) as process:  # fmt: skip
            try:
                process.communicate(source, timeout=timeout)
            except subprocess.TimeoutExpired:
                return False
            finally:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
        try:
            return process.returncode == 0 and os.read(out, len(word)) == word
        except BlockingIOError:  # nothing was said
            return False
    finally:
        os.close(out)
        os.close(into)
