"""Answers, the runner of programs, and problems in the formats of their data sets, on tiny files."""

from __future__ import annotations

import json
import sys
import time
import types
from pathlib import Path
from typing import Any

import pytest
import yaml
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from datamodules.reasoning_answers import (
    as_integer,
    check_answer,
    extract_answer,
    math_verify,
    plain_references,
    read_letter,
    run_tests,
)
from datamodules.reasoning_problems import END, ReasoningProblems, TextProblem
from zoo.main import main


@pytest.mark.parametrize(
    ("text", "form", "answer"),
    [
        (r"so \boxed{12} no, \boxed{\frac{1}{2}}", "math", r"\frac{1}{2}"),
        (r"open \boxed{7} and \boxed{8", "integer", "7"),
        ("It is 5.\n#### 1,234", "integer", "1,234"),
        ("The answer is: **42**.", "integer", "42"),
        ("Final answer: (B) because", "choice", "(B) because"),
        ("we get 17.", "integer", "17"),
        ("17 is prime, I think", "integer", None),
        ("we get 17.", "math", None),
        ("", "integer", None),
        ("Answer:", "integer", None),
        ("a\n```python\nx = 1\n```\nb\n```\ny = 2\n```", "code", "y = 2\n"),
    ],
)
def test_where_answers_are(text: str, form: str, answer: str | None) -> None:
    assert extract_answer(text, form) == answer


def test_whole_numbers_need_no_library() -> None:
    assert as_integer("$1{,}0$") is None
    assert [as_integer(t) for t in ("007", "-1,000", "$25$", "3.0", "x")] == [7, -1000, 25, None, None]
    assert check_answer(r"\boxed{073}", "73", "integer")
    assert check_answer(r"\boxed{73}", "73", "math")
    assert not check_answer(r"\boxed{74}", "73", "integer")
    assert not check_answer("no answer here", "73", "integer")
    assert not check_answer(r"\boxed{1/2}", "1", "integer")
    assert check_answer("Answer: (c)", "C", "choice")
    assert not check_answer("Answer: none of them", "C", "choice")


@pytest.mark.parametrize(
    ("answer", "letter"),
    [
        ("(b)", "B"), ("B.", "B"), ("b", "B"), ("**C**", "C"), (r"\text{B}", "B"), (r"\textbf{(D)}", "D"),
        ("B) because of D", "B"), ("option B", "B"), ("C: 4 apples", "C"), ("I believe (C)", "C"), ("[A]", "A"),
        ("I think B", "B"), ("A circle", None), ("none of them", None), ("42", None), ("", None), ("A, since a", "A"),
        ("B) not (D)", "B"),
    ],
)  # fmt: skip
def test_letters_of_choices(answer: str, letter: str | None) -> None:
    assert read_letter(answer) == letter


def test_latex_needs_one_and_says_which(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "math_verify", None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'method-zoo\[math\]'"):
        check_answer(r"\boxed{\frac{1}{3}}", r"\frac{2}{6}", "math")


def test_latex_is_compared_by_value() -> None:
    pytest.importorskip("math_verify")
    math_verify()
    assert check_answer(r"\boxed{\frac{1}{2}}", "0.5", "math")
    assert check_answer(r"\boxed{x^2 + 2x + 1}", "(x+1)^2", "math")
    assert not check_answer(r"\boxed{\frac{1}{2}}", r"\frac{1}{4}", "math")


def test_programs_run_with_limits() -> None:
    good = "def double(x):\n    return 2 * x\n"
    assert run_tests(good, "assert double(2) == 4")
    assert not run_tests(good, "assert double(2) == 5")
    assert not run_tests("while True: pass", "", timeout=0.5)
    assert not run_tests("x = bytearray(1 << 32)", "")
    assert not run_tests("import os; assert 'PATH' in os.environ", "")
    assert not run_tests("syntax error", "")
    # a program that leaves before its tests has not passed them
    assert not run_tests(good + "import sys; sys.exit(0)", "assert double(2) == 5")
    assert not run_tests(good + "import os; os._exit(0)", "assert double(2) == 5")
    assert run_tests(good + "if __name__ == '__main__':\n    raise SystemExit", "assert double(2) == 4")
    assert run_tests(good + "print('x' * 10_000_000)", "assert double(2) == 4")
    assert not run_tests("open('f', 'w').write('x' * (1 << 21))", "")


def test_what_a_program_starts_ends_with_it(tmp_path: Path) -> None:
    spawn = "import subprocess; subprocess.Popen(['/bin/sh', '-c', 'sleep 0.7; echo > {}']);"
    run_tests(spawn.format(tmp_path / "ended"), "")
    assert not run_tests(spawn.format(tmp_path / "timed") + "import time; time.sleep(9)", "", timeout=0.4)
    time.sleep(1)
    assert list(tmp_path.iterdir()) == []


def lines(path: Path, *rows: dict[str, Any]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


@pytest.fixture
def tokenizer(tmp_path: Path) -> str:
    """A tokenizer of bytes without one of them."""
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {c: i for i, c in enumerate(c for c in alphabet if c != "~")} | {"<e>": 255, "<u>": 256}
    inner = Tokenizer(models.BPE(vocab, [], unk_token="<u>"))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    folder = tmp_path / "tokenizer"
    PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="<e>", unk_token="<u>").save_pretrained(folder)
    return str(folder)


def test_jsonl_with_a_tokenizer(tmp_path: Path, tokenizer: str) -> None:
    path = lines(
        tmp_path / "p.jsonl", {"key": "a", "question": "2+2?", "answer": 4}, {"question": "1/3?", "answer": "1/3"}
    )
    traces = lines(tmp_path / "t.jsonl", {"key": "a", "trace": "Two and two.\nSo \\boxed{4}"})
    data = ReasoningProblems(path=path, tokenizer=tokenizer, traces=traces)
    first, second = data.problems
    assert (first.form, second.form) == ("integer", "math")
    assert (data.vocab_size, data.eos_id) == (257, 255)
    assert first.text(first.prompt).startswith("2+2?\nPlease")
    trace = data.traces[0][0]
    assert trace[-1] == 255
    assert first.judge(trace)
    assert not first.judge(trace[:-1])  # out of budget
    assert "".join(first.pieces(trace)) == "Two and two.\nSo \\boxed{4}"
    start = first.answer_start(trace)
    assert first.text(trace[:start]) == "Two and two.\nSo "
    assert first.answer_start(trace[:start]) == start
    batch = data.predict_dataloader().dataset.batch(0, 0)
    assert [p.key for p in batch["problems"]] == ["a"]
    # a test with given traces is one of these alone, and without a file one of all problems
    assert data.test_dataloader().dataset.batch(0, 0)["problems"] == batch["problems"]
    assert len(ReasoningProblems(path=path).test_dataloader().dataset.batch(0, 0)["problems"]) == 2
    none = lines(tmp_path / "none.jsonl")
    with pytest.raises(ValueError, match=r"none.jsonl' has no traces"):
        ReasoningProblems(path=path, traces=none).setup("test")
    curves = lines(tmp_path / "curves.jsonl", {"key": "a/t0-1", "problem": "a", "text": "Two and two.\nSo \\boxed{4}"})
    assert ReasoningProblems(path=path, tokenizer=tokenizer, traces=curves).traces == data.traces
    bad = lines(tmp_path / "bad.jsonl", {"key": "a", "trace": "about ~4"})
    with pytest.raises(ValueError, match=r"bad.jsonl:1: the tokenizer does not give the text back: '~4' became"):
        _ = ReasoningProblems(path=path, tokenizer=tokenizer, traces=bad).traces


def test_templates_of_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = lines(tmp_path / "p.jsonl", {"question": "2+2?", "answer": "4"})

    def call(template: str) -> tuple[int, str, str]:
        words = ["test", "--config", "cot_potential/server", "--data.path", path, "--print_config"]
        code = main([*words, "--data.template", template])
        said = capsys.readouterr()
        return code, said.out, said.err

    for typed, template in (("{question} Think.", "{question} Think."), (r'"Q: {question}\n"', "Q: {question}\n")):
        code, out, _ = call(typed)
        assert code == 0
        read = yaml.safe_load(out)["data"]["init_args"]["template"]
        assert read == template
        assert ReasoningProblems(path=path, template=read).problems[0].question == template.format(question="2+2?")
    code, _, err = call("Q: {question}")
    assert code == 2
    assert "data.init_args.template: expected str, got {'Q': {'question': None}}" in err
    assert "goes into quotes of its own: --data.template \"'...'\"" in err


def test_texts_for_a_server(tmp_path: Path) -> None:
    path = lines(tmp_path / "p.jsonl", {"question": "2+2?", "answer": "4"})
    data = ReasoningProblems(path=path)
    problem = data.problems[0]
    assert (data.vocab_size, data.eos_id) == (0, 0)
    # other ends of lines than JSONL's may stand in texts
    odd = json.dumps({"key": "1", "trace": "So\u2028x\x85\n#### 4"}, ensure_ascii=False)
    (tmp_path / "t.jsonl").write_text(odd + "\n", encoding="utf-8")
    assert ReasoningProblems(path=path, traces=str(tmp_path / "t.jsonl")).traces == [["So\u2028x\x85\n#### 4" + END]]
    trace = problem.encode("So\n#### 4", "t")
    assert trace == f"So\n#### 4{END}"
    assert problem.judge(trace)
    assert problem.answer_start(trace) == 3


#: Rows with the columns of the data sets, and short texts of our own.
AIME = {"id": 60, "problem": "Every morning", "answer": "204", "solution": "s", "url": "u", "year": "2024"}
MATH = {"problem": "Convert", "solution": "s", "answer": "\\left( 3, \\frac{\\pi}{2} \\right)", "level": 2,
        "subject": "Precalculus", "unique_id": "test/precalculus/807.json"}  # fmt: skip
GPQA = {"Question": "Which?", "Correct Answer": " right\n", "Subdomain": "Organic",
        **{f"Incorrect Answer {i}": f"wrong {i}" for i in (1, 2, 3)}}  # fmt: skip
HUMANEVAL = {
    "task_id": "HumanEval/32",
    "prompt": 'import math\n\n\ndef helper(x):\n    return math.floor(x)\n\n\ndef double(x):\n    """Double."""\n',
    "entry_point": "double",
    "canonical_solution": "    return 2 * helper(x)\n",
    "test": "METADATA = {}\n\n\ndef check(candidate):\n    assert candidate(2.5) == 2 * helper(2)\n",
}


@pytest.mark.parametrize("ending", ["jsonl", "parquet"])
def test_formats_of_data_sets(tmp_path: Path, ending: str) -> None:
    def stored(name: str, *rows: dict[str, Any]) -> str:
        path = tmp_path / f"{name}.{ending}"
        if ending == "jsonl":
            return lines(path, *rows)
        from datasets import Dataset

        Dataset.from_list(list(rows)).to_parquet(str(path))
        return str(path)

    if ending == "parquet":
        pytest.importorskip("datasets")
    (aime,) = ReasoningProblems("aime", stored("aime", AIME)).problems
    assert (aime.key, aime.reference, aime.form) == ("60", "204", "integer")
    assert [aime.judge(f"\\boxed{{{x}}}{END}") for x in ("204", "0204", "205")] == [True, True, False]
    (math,) = ReasoningProblems("math500", stored("math", MATH)).problems
    assert (math.key, math.form, math.reference) == (MATH["unique_id"], "math", MATH["answer"])
    letters = []
    path = stored("gpqa", *({**GPQA, "Record ID": f"rec{i}"} for i in range(4)))
    for i, problem in enumerate(ReasoningProblems("gpqa", path).problems):
        assert (problem.key, problem.form) == (f"rec{i}", "choice")
        assert f"({problem.reference}) right\n" in problem.question
        assert all(f") wrong {k}\n" in problem.question for k in (1, 2, 3))
        assert problem.judge(f"\\boxed{{{problem.reference}}}{END}")
        letters.append(problem.reference)
    assert len(set(letters)) > 1
    code = ReasoningProblems("humaneval", stored("code", HUMANEVAL), run_code=True).problems[0]
    assert (code.key, code.form) == ("HumanEval/32", "code")
    # what stands before the function in the question may be called by it and by its tests
    fenced = "Here:\n```python\ndef double(x):\n    return {} * helper(x)\n```"
    assert code.judge(code.encode(fenced.format(2), "t"))
    assert not code.judge(code.encode(fenced.format(3), "t"))
    with pytest.raises(ValueError, match="run_code: false"):
        _ = ReasoningProblems("humaneval", stored("code", HUMANEVAL)).problems


def test_data_sets_of_the_hub_are_asked_for_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("datasets")
    asked = []

    def load_dataset(name: str, part: str | None, split: str) -> list[dict[str, Any]]:
        asked.append((name, part, split))
        return {"HuggingFaceH4/aime_2024": [AIME], "HuggingFaceH4/MATH-500": [MATH]}.get(name, [GPQA])

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    for source in ("aime", "math500", "gpqa"):
        assert len(ReasoningProblems(source).problems) == 1
    assert asked == [
        ("HuggingFaceH4/aime_2024", None, "train"),
        ("HuggingFaceH4/MATH-500", None, "test"),
        ("Idavidrein/gpqa", "gpqa_diamond", "train"),
    ]


def test_packages(monkeypatch: pytest.MonkeyPatch) -> None:
    problem = types.SimpleNamespace(identifier="P_1", text="How many?", answer="239")
    champ: Any = types.ModuleType("champ_dataset")
    champ.load = lambda name: types.SimpleNamespace(problems={"P_1": problem})
    monkeypatch.setitem(sys.modules, "champ_dataset", champ)
    assert ReasoningProblems("champ").problems[0].reference == "239"
    monkeypatch.setitem(sys.modules, "champ_dataset", None)
    with pytest.raises(ModuleNotFoundError, match="champ-dataset"):
        _ = ReasoningProblems("champ").problems
    monkeypatch.setitem(sys.modules, "reasoning_gym", None)
    with pytest.raises(ModuleNotFoundError, match="reasoning-gym"):
        _ = ReasoningProblems("reasoning_gym", "basic_arithmetic").problems


@pytest.mark.parametrize(
    ("written", "values"),
    [
        ("100 (i.e., all numbers)", ["100"]),
        ("-3 is the only possible value", ["-3"]),
        ("At most 0 integer-valued roots (i.e., no integer roots)", ["0"]),
        ("2*C(10, 5), or equivalently 504", [r"2*\binom{10}{5}", "504"]),
        ("5/14, or approximately 35.7%", ["5/14"]),
        ("The limit exists and is equal to (a+3b)/2", ["(a+3b)/2"]),
        ("(x+1)(x-1) (i.e., two factors (of (many)))", ["(x+1)(x-1)"]),
        ("Exactly one sequence", ["1"]),
        ("No such values", ["No such values"]),
        ("There are no prime numbers in the sequence", ["There are no prime numbers in the sequence"]),
        ("x=1, y=1 and x=3, y=2", ["x=1, y=1 and x=3, y=2"]),
    ],
)
def test_references_that_are_written_for_people(written: str, values: list[str]) -> None:
    assert plain_references(written) == values


def test_one_of_several_forms_will_do() -> None:
    problem = TextProblem("a", "q", "2", "integer", others=("3",))
    assert [problem.judge(f"\\boxed{{{x}}}{END}") for x in (2, 3, 4)] == [True, True, False]


def test_a_task_judges_its_own_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    class Rows(list[dict[str, Any]]):
        def score_answer(self, answer: str | None, entry: dict[str, Any]) -> float:
            return 1.0 if answer and sorted(answer) == sorted(entry["answer"]) else 0.01

    gym: Any = types.ModuleType("reasoning_gym")
    gym.create_dataset = lambda name, size, seed: Rows([{"question": "an anagram of abc", "answer": "cab"}] * size)
    monkeypatch.setitem(sys.modules, "reasoning_gym", gym)
    problem = ReasoningProblems("reasoning_gym", "anagrams", num_problems=2).problems[1]
    assert [problem.judge(f"\\boxed{{{x}}}{END}") for x in ("cab", "bca", "abd")] == [True, True, False]
    assert not problem.judge("\\boxed{cab}")  # it has not ended
    assert not problem.judge(f"cab{END}")


def test_the_real_champ() -> None:
    pytest.importorskip("champ_dataset")
    problems = ReasoningProblems("champ").problems
    assert len(problems) == 270
    assert {p.form for p in problems} == {"integer", "math"}
    pytest.importorskip("math_verify")
    assert all(p.judge(f"So \\boxed{{{r}}}{END}") for p in problems for r in (p.reference, *p.others))


@pytest.mark.parametrize("task", ["countdown", "word_sorting", "knights_knaves", "basic_arithmetic"])
def test_the_real_reasoning_gym(task: str) -> None:
    pytest.importorskip("reasoning_gym")
    data = ReasoningProblems("reasoning_gym", task, num_problems=10, data_seed=3)
    for problem in data.problems:
        assert problem.judge(f"So \\boxed{{{problem.reference}}}{END}")
        assert not problem.judge(f"So \\boxed{{nothing}}{END}")
    again = ReasoningProblems("reasoning_gym", task, num_problems=10, data_seed=3).problems
    assert [p.question for p in again] == [p.question for p in data.problems]
    with pytest.raises(ValueError, match="path: 'no_such_task' is no task of reasoning-gym"):
        _ = ReasoningProblems("reasoning_gym", "no_such_task").problems


def test_bad_input(tmp_path: Path) -> None:
    good = {"question": "2+2?", "answer": "4"}
    with pytest.raises(ValueError, match=r"problem '1' .* has no reference answer \(field 'answer'\)"):
        _ = ReasoningProblems(path=lines(tmp_path / "a.jsonl", {"question": "x"})).problems
    with pytest.raises(ValueError, match="has no question"):
        _ = ReasoningProblems(path=lines(tmp_path / "b.jsonl", {"question": " ", "answer": "4"})).problems
    with pytest.raises(FileNotFoundError, match="no file"):
        _ = ReasoningProblems(path=str(tmp_path / "none.jsonl")).problems
    with pytest.raises(ValueError, match="two problems have the key 'a'"):
        _ = ReasoningProblems(path=lines(tmp_path / "c.jsonl", {**good, "key": "a"}, {**good, "key": "a"})).problems
    empty = tmp_path / "empty.jsonl"
    empty.write_text("\n", encoding="utf-8")
    with pytest.raises(ValueError, match="there are no problems"):
        _ = ReasoningProblems(path=str(empty)).problems
    path = lines(tmp_path / "p.jsonl", good)
    (tmp_path / "p.jsonl").write_text("{}\nnot json\n", encoding="utf-8")
    with pytest.raises(ValueError, match=r"p.jsonl:2: not JSON"):
        _ = ReasoningProblems(path=path).problems
    path = lines(tmp_path / "p.jsonl", good)
    with pytest.raises(ValueError, match="got key 'other'"):
        _ = ReasoningProblems(path=path, traces=lines(tmp_path / "t.jsonl", {"key": "other", "trace": "x"})).traces
    with pytest.raises(ValueError, match="predict needs a JSONL file of traces"):
        ReasoningProblems(path=path).setup("predict")
    with pytest.raises(ValueError, match="accepted: test and predict"):
        ReasoningProblems(path=path).setup("fit")
    for options, message in [
        ({"source": "csv"}, "source: 'csv'"),
        ({"source": "jsonl"}, "path: empty"),
        ({"path": "x", "form": "essay"}, "form: 'essay'"),
        ({"path": "x", "template": "hello"}, "no {question}"),
    ]:
        with pytest.raises(ValueError, match=message):
            ReasoningProblems(**options)  # type: ignore[arg-type]


def test_problems_compare_and_print_without_their_tokenizer() -> None:
    assert TextProblem("a", "q", "4", "integer", tokenizer=object()) == TextProblem("a", "q", "4", "integer")
