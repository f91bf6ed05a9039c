"""The engine for servers against a stub on this machine: concurrency, retries, limits, and what a crash leaves."""

from __future__ import annotations

import contextlib
import json
import socketserver
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, ClassVar

import pytest

from datamodules.reasoning_problems import TextProblem
from tests.support.endpoint import Endpoint, Reply, serving
from zoo.api import run
from zoo.errors import RunError, UsageError
from zoo.methods.cot_potential.curves import Chunker, make_trace, sample_curves, write_traces
from zoo.methods.cot_potential.engine import Job
from zoo.methods.cot_potential.server import END, ServerEngine
from zoo.methods.cot_potential.store import SampleStore
from zoo.methods.cot_potential.streams import Policy

PROBLEM = TextProblem("q1", "Q: 2 + 2?\n", "4", "integer")


class Stub(Endpoint):
    """Answers as the tests want it; a token is a word."""

    def __init__(self) -> None:
        super().__init__(self.complete)
        self.lock = threading.Lock()
        self.now = self.most = self.served = 0
        #: What the next requests are answered with before the server behaves.
        self.faults: list[str] = []
        self.fail_from = 10**9
        self.fail_with = "503"
        self.pause = 0.0
        #: Numbers of requests that are answered late.
        self.late: set[int] = set()

    def engine(self, **options: Any) -> ServerEngine:
        policy = Policy(budget=options.pop("budget", 50))
        return ServerEngine(policy, self.url, "stub", **{"backoff": 0.01, "timeout": 5.0, **options})

    def complete(self, body: dict[str, Any]) -> Reply:
        with self.lock:
            self.now, self.served = self.now + 1, self.served + 1
            self.most, number = max(self.most, self.now), self.served
            fault = self.faults.pop(0) if self.faults else ""
            if self.served >= self.fail_from:
                fault = self.fail_with
        time.sleep(0.3 if number in self.late else self.pause)
        with self.lock:
            self.now -= 1
        if fault == "slow":
            time.sleep(0.5)
        if fault.isdigit():
            return int(fault)
        if fault in ("garbage", "empty"):
            return {"garbage": b"<html>", "empty": {"choices": []}}[fault]
        # a prefix that says where it leads is followed; others are right for even seeds
        right = "so" in body["prompt"] or body.get("seed", 0) % 2 == 0
        text, reason = f" well #### {4 if right else 5}", "stop"
        if body["max_tokens"] < 3:
            text, reason = " well", "length"
        usage = {"prompt_tokens": len(body["prompt"].split()), "completion_tokens": 3}
        return {"choices": [{"text": text, "finish_reason": reason}], "usage": usage}


@pytest.fixture
def stub() -> Iterator[Stub]:
    with serving(server := Stub()):
        yield server


def jobs(engine: ServerEngine, count: int) -> list[Job]:
    return [Job(engine.open("q1/t", PROBLEM.prompt, "", [0]), 0, 0, range(count))]


def test_curves_of_texts(stub: Stub) -> None:
    engine = stub.engine()
    written = write_traces(engine, [PROBLEM], 6, SampleStore(None))[0]
    assert {PROBLEM.judge(t) for t in written} == {True, False}
    trace = make_trace(PROBLEM, f"First.\nso two.\n#### 4{END}", Chunker("newline"), "t")
    assert [trace.tokens[a:b] for a, b in zip(trace.boundaries, trace.boundaries[1:], strict=False)] == [
        "First.\n", "so two.\n", f"#### 4{END}",
    ]  # fmt: skip
    curve = sample_curves(engine, [trace], 40, SampleStore(None))[0]
    assert 0.2 < float(curve.pot[0]) < 0.8
    assert curve.pot[2:].tolist() == [1.0, 1.0]
    assert trace.before_answer == 2
    # the budget is that of prefix and completion together, in the server's tokens
    assert {b["max_tokens"] for b in stub.bodies if b["prompt"].endswith("so two.\n") and "seed" in b} == {50 - 3}


def test_seeds_are_those_of_the_rows(stub: Stub) -> None:
    first, second = stub.engine(), stub.engine(concurrency=1)
    one = first.complete(jobs(first, 12))
    seeds = sorted(b["seed"] for b in stub.bodies)
    assert len(set(seeds)) == 12
    stub.asked.clear()
    assert second.complete(jobs(second, 12)) == one
    assert sorted(b["seed"] for b in stub.bodies) == seeds


def test_concurrency_is_bounded(stub: Stub) -> None:
    stub.pause = 0.02
    engine = stub.engine(concurrency=3)
    engine.complete(jobs(engine, 18))
    assert stub.most == 3


@pytest.mark.parametrize("fault", ["garbage", "empty", "500", "429", "slow"])
def test_faults_are_tried_again(stub: Stub, fault: str) -> None:
    stub.faults = [fault, fault]
    engine = stub.engine(timeout=0.2 if fault == "slow" else 5.0, concurrency=1)
    assert len(engine.complete(jobs(engine, 3))[0]) == 3


@pytest.mark.parametrize(
    ("fault", "message"), [("garbage", "no JSON"), ("slow", "no answer"), ("empty", "without choices")]
)
def test_a_server_that_stays_broken_is_named(stub: Stub, fault: str, message: str) -> None:
    stub.faults = [fault] * 50
    engine = stub.engine(retries=2, timeout=0.1, concurrency=1)
    with pytest.raises(RunError, match=rf"failed 3 times: .*{message}"):
        engine.complete(jobs(engine, 2))


def test_a_refusal_is_not_tried_again(stub: Stub) -> None:
    stub.faults = ["404"] * 9
    engine = stub.engine(concurrency=1)
    with pytest.raises(UsageError, match="refuses the request with status 404"):
        engine.complete(jobs(engine, 2))
    assert len(stub.bodies) == 1


def test_nothing_is_lost_and_the_limit_holds(stub: Stub, tmp_path: Path) -> None:
    path = tmp_path / "samples.jsonl"
    stub.fail_from = 8
    engine = stub.engine(retries=0, concurrency=2)
    with pytest.raises(RunError, match="what was drawn is kept"):
        write_traces(engine, [PROBLEM], 20, SampleStore(path))
    kept = SampleStore(path)
    assert kept.found == 7
    stub.fail_from = 10**9
    stub.asked.clear()
    again = stub.engine(concurrency=2)
    write_traces(again, [PROBLEM], 20, kept)
    assert len(stub.bodies) == 20 - kept.found


@pytest.mark.parametrize("fault", ["503", "404"])
def test_answers_under_way_are_kept_when_another_request_fails_for_good(stub: Stub, tmp_path: Path, fault: str) -> None:
    stub.late, stub.fail_from, stub.fail_with = {1, 2, 3}, 4, fault
    engine = stub.engine(retries=0, concurrency=4)
    with pytest.raises((RunError, UsageError), match=fault):
        write_traces(engine, [PROBLEM], 20, SampleStore(tmp_path / "s.jsonl"))
    assert SampleStore(tmp_path / "s.jsonl").found == engine.meter.decoded / 3 == 3
    assert len(stub.bodies) == 4  # and nothing was asked after it


def test_a_request_that_was_about_to_be_tried_again_does_not_hold_up_the_end(stub: Stub) -> None:
    stub.faults, stub.pause = ["503", "404"], 0.02
    engine = stub.engine(concurrency=2, backoff=60.0)
    begin = time.monotonic()
    with pytest.raises(UsageError, match="404"):
        engine.complete(jobs(engine, 5))
    assert time.monotonic() - begin < 20
    assert len(stub.bodies) == 2


def test_answers_under_way_are_kept_when_the_run_is_stopped(stub: Stub) -> None:
    stub.late = {2, 3, 4}
    engine, kept = stub.engine(concurrency=4), []

    def sink(job: Job, rows: Sequence[int], texts: Sequence[str]) -> None:
        kept.extend(rows)
        if len(kept) == 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        engine.complete(jobs(engine, 20), sink=sink)
    assert len(kept) == len(set(kept)) == len(stub.bodies) == 4


def test_the_limit_on_tokens_is_never_exceeded(stub: Stub, tmp_path: Path) -> None:
    # answers have three tokens and may have five: with 14 to spend four fit one after the other, and no fifth
    stub.pause = 0.02
    engine = stub.engine(budget=5, max_tokens_total=14, concurrency=8)
    with pytest.raises(RunError, match=r"max_tokens_total: 12 of 14 tokens are used up, and the next .* may take 5"):
        write_traces(engine, [PROBLEM], 20, SampleStore(tmp_path / "s.jsonl"))
    assert stub.most == 2  # 5 + 5 fit into 14, three requests would not
    assert engine.meter.decoded == 12
    assert SampleStore(tmp_path / "s.jsonl").found == 4
    more = stub.engine(budget=5, max_tokens_total=10**6, concurrency=8)
    write_traces(more, [PROBLEM], 20, SampleStore(tmp_path / "s.jsonl"))
    assert more.meter.decoded == 16 * 3


class Broken(socketserver.StreamRequestHandler):
    """Says something that is no HTTP, or breaks off in the middle."""

    replies: ClassVar[list[bytes]] = []

    def handle(self) -> None:
        with contextlib.suppress(OSError):
            self.request.recv(65536)
            self.wfile.write(self.replies.pop(0))


@pytest.mark.parametrize("reply", [b"", b"hello\r\n\r\n", b"HTTP/1.1 200 OK\r\nContent-Length: 999\r\n\r\n{"])
def test_a_server_that_breaks_off_is_asked_again(reply: bytes) -> None:
    good = json.dumps({"choices": [{"text": "4", "finish_reason": "stop"}], "usage": {"completion_tokens": 1}}).encode()
    Broken.replies = [reply, b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%s" % (len(good), good)]
    with socketserver.ThreadingTCPServer(("127.0.0.1", 0), Broken) as server:
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_address[1]}/v1"
        engine = ServerEngine(Policy(budget=9), url, "m", backoff=0.01, timeout=5.0)
        assert engine.complete(jobs(engine, 1)) == [[f"4{END}"]]
        server.shutdown()
    assert Broken.replies == []


def test_chunks_end_where_they_are_told_to(stub: Stub) -> None:
    engine = stub.engine()
    assert engine.complete(jobs(engine, 2), stop=["####", "ll"]) == [[" well", " well"]]
    assert engine.complete(jobs(engine, 1), stop=["never"])[0][0].endswith(END)
    assert all("stop" not in body for body in stub.bodies)
    assert engine.room(PROBLEM.prompt, "") == 50
    assert engine.room(PROBLEM.prompt, "a b c") == 47


def test_no_room_and_no_end(stub: Stub) -> None:
    engine = stub.engine(budget=2)
    assert engine.complete(jobs(engine, 1)) == [[" well"]]  # ran out: no end, and no answer
    assert not PROBLEM.judge(" well")
    opened = engine.open("q1/t", PROBLEM.prompt, "a b c d", [7])
    with pytest.raises(UsageError, match="a prefix of 4 tokens with budget: 2"):
        engine.complete([Job(opened, 7, 1, range(2))])


def test_a_whole_analysis_from_files(stub: Stub, tmp_path: Path) -> None:
    problems, traces = tmp_path / "problems.jsonl", tmp_path / "traces.jsonl"
    rows = [{"key": k, "question": f"{k}: 2 + 2?", "answer": "4"} for k in "ab"]
    problems.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    traces.write_text(json.dumps({"key": "a", "trace": "Well.\nso it is\n#### 4"}) + "\n", encoding="utf-8")
    overrides = {
        "model.server": {"url": stub.url, "model": "stub", "backoff": 0.01},
        "model.samples": 6,
        "model.budget": 40,
        "model.studies": ["curves", "pass_at_k", "optimise", "transfer"],
        "model.analysis": {"pass_samples": 4, "guess_samples": 4, "candidates": 8, "choice_samples": 4},
        "data.path": str(problems),
        "data.template": "Question {question}",
    }
    call: dict[str, Any] = {"config": "cot_potential/server", "wandb": "disabled"}
    found = run("test", overrides=overrides, run_dir=tmp_path / "test", **call)
    assert 0 < found.metrics["test/pass_at_1"] <= 1
    assert found.metrics["test/traces"] > 0
    assert found.metrics["test/optimised_final_potential"] == 1.0
    assert 0 < found.metrics["test/transfer_acc_0"] < 1
    assert "characters</text>" in (tmp_path / "test" / "analysis" / "report.html").read_text(encoding="utf-8")
    own = tmp_path / "predict"
    run("predict", overrides={**overrides, "data.traces": str(traces)}, run_dir=own, **call)
    (row,) = [json.loads(line) for line in (own / "analysis" / "curves.jsonl").read_text(encoding="utf-8").splitlines()]
    assert row["chunks"] == ["Well.\n", "so it is\n", "#### 4"]
    assert row["pot"][2:] == [1.0, 1.0]
    traces.write_text(json.dumps({"key": "a", "trace": "I do not know"}) + "\n", encoding="utf-8")
    with pytest.raises(UsageError, match="does not contain an answer"):
        run("predict", overrides={**overrides, "data.traces": str(traces)}, run_dir=tmp_path / "bad", **call)


def test_an_analysis_that_broke_off_goes_on_and_asks_nothing_twice(stub: Stub, tmp_path: Path) -> None:
    problems = tmp_path / "problems.jsonl"
    problems.write_text(json.dumps({"key": "a", "question": "2 + 2?", "answer": "4"}) + "\n", encoding="utf-8")
    overrides = {
        "model.server": {"url": stub.url, "model": "stub", "retries": 0, "concurrency": 1},
        "model.samples": 6,
        "model.budget": 40,
        "model.studies": ["curves"],
        "data.path": str(problems),
        "data.template": "Question {question}",
    }
    own, stub.fail_from = tmp_path / "run", 9
    with pytest.raises(RunError, match="what was drawn is kept"):
        run("test", config="cot_potential/server", overrides=overrides, run_dir=own, wandb="disabled")
    answered = {(b["prompt"], b["seed"]) for b in stub.bodies[:8] if "seed" in b}
    assert len(answered) >= 6
    stub.fail_from = 10**9
    stub.asked.clear()
    found = run("test", resume=own, wandb="disabled")
    assert found.metrics["test/traces"] == 1
    assert not answered & {(b["prompt"], b["seed"]) for b in stub.bodies if "seed" in b}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"url": "ftp://x"}, "server.url"),
        ({"concurrency": 0}, "server.concurrency: 0"),
        ({"api_key_env": "NO_SUCH_VARIABLE_HERE"}, "api_key_env"),
    ],
)
def test_bad_values(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ServerEngine(Policy(), **{"url": "http://127.0.0.1:1/v1", "model": "m", **options})
