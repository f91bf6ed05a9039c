"""Campaigns with a fake zoo: what is run, what is not, and what a kill leaves."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.claims.conftest import FakeChild, World
from zoo.claims.campaign import exclusive, newest_checkpoint
from zoo.errors import UsageError

pytestmark = pytest.mark.usefixtures("undrawn")

ALL = ["a/0 fit", "a/0 test", "b/0 fit", "b/0 test", "a/1 fit", "a/1 test", "b/1 fit", "b/1 test"]


def options_of(world: World, run: str, seed: int = 0) -> dict[str, str]:
    import json

    return json.loads((world.runs / "fake" / "cpu" / run / str(seed) / "summary.json").read_text())["options"]


def test_a_campaign_makes_every_run_once_seed_by_seed_and_judges(world: World) -> None:
    assert world.reproduce() == 0
    assert world.calls() == ALL
    content = world.json
    assert (content["method"], content["scale"], content["seeds"]) == ("fake", "cpu", [0, 1])
    assert content["runs"]["a"] == {
        "0": {"test/acc": 0.7, "test/seed": 0.0, "train/steps": 1.0},
        "1": {"test/acc": 0.71, "test/seed": 1.0, "train/steps": 1.0},
    }
    assert content["seconds"]["b"] == {"0": 3.0, "1": 3.0}
    (claim,) = content["claims"]
    assert claim["mean"] == pytest.approx(0.2)
    assert claim["holds"] is True
    assert claim["fixed_before_runs"] is True
    assert world.reproduce() == 0
    assert world.calls() == ALL, "nothing was missing"


def test_fewer_seeds_give_no_verdict_and_the_rest_comes_later(world: World) -> None:
    assert world.reproduce(seeds=1) == 0
    assert world.calls() == ALL[:4]
    assert world.json["claims"][0]["holds"] is None
    assert world.command(str(world.claims), "--check") == 1
    assert world.reproduce() == 0
    assert world.calls() == ALL


def test_only_makes_what_a_claim_needs(world: World, make_claim) -> None:
    world.write(claims=[make_claim(), make_claim("a-alone", right=0.5)])
    assert world.reproduce(only=("a-alone",)) == 0
    assert world.calls() == [call for call in ALL if call.startswith("a")]
    verdicts = {claim["id"]: claim["holds"] for claim in world.json["claims"]}
    assert verdicts == {"a-beats-b": None, "a-alone": True}


def test_what_changed_is_made_again_and_nothing_else(world: World) -> None:
    world.reproduce()
    world.body["runs"]["b"]["overrides"]["model.init_args.acc"] = 0.6
    world.write()
    old = world.runs / "fake" / "cpu" / "b" / "0" / "left_over"
    old.write_text("")
    assert world.reproduce() == 0
    assert world.calls()[len(ALL) :] == ["b/0 fit", "b/0 test", "b/1 fit", "b/1 test"]
    assert not old.exists(), "a stale run was continued"
    assert world.json["runs"]["b"]["0"]["test/acc"] == 0.6


def test_a_directory_that_reproduce_did_not_make_is_not_removed(world: World) -> None:
    theirs = world.runs / "fake" / "cpu" / "a" / "0"
    theirs.mkdir(parents=True)
    (theirs / "thesis.tex").write_text("dear")
    with pytest.raises(UsageError, match="was not made by reproduce"):
        world.reproduce()
    assert (theirs / "thesis.tex").read_text() == "dear"


def test_a_run_gets_the_checkpoint_of_the_run_it_needs_with_its_seed(world: World) -> None:
    world.body["runs"]["b"]["overrides"] |= {
        "model.init_args.start": "${a.checkpoint}",
        "model.init_args.of": "${a.run_dir}",
    }
    world.write()
    assert world.reproduce() == 0
    for seed in (0, 1):
        base = world.runs / "fake" / "cpu" / "a" / str(seed)
        options = options_of(world, "b", seed)
        assert options["model.init_args.start"] == str(base / "checkpoints" / "step=1.ckpt")
        assert options["model.init_args.of"] == str(base)


def test_a_checkpoint_that_is_gone_is_made_again_when_it_is_needed(world: World) -> None:
    import shutil

    world.body["runs"]["b"]["needs"] = ["a"]
    world.write()
    world.reproduce(seeds=1)
    shutil.rmtree(world.runs)
    world.body["runs"]["b"]["overrides"]["model.init_args.acc"] = 0.6
    world.write()
    assert world.reproduce(seeds=1) == 0
    assert world.calls()[4:] == ["a/0 fit", "a/0 test", "b/0 fit", "b/0 test"]


def test_a_failure_is_reported_and_stops_only_what_needs_it(world: World, capsys: pytest.CaptureFixture[str]) -> None:
    base = world.body["runs"]["a"]
    world.body["runs"] = {
        "bad": {**base, "overrides": {"model.init_args.crash": True}},
        "after": {**base, "needs": ["bad"]},
        **world.body["runs"],
    }
    world.write()
    assert world.reproduce(seeds=1) == 1
    assert world.calls() == ["bad/0 fit", *ALL[:4]]
    errors = capsys.readouterr().err
    assert "bad seed 0 failed" in errors
    assert "this is why" in errors
    assert "after seed 0 failed" in errors
    assert "needs bad, which failed" in errors
    assert world.reproduce(seeds=1) == 1
    assert world.calls()[5:] == ["bad/0 fit resumed"], "the failed run was not tried again"


def test_code_that_changes_during_a_campaign_stops_what_has_not_begun(
    world: World, capsys: pytest.CaptureFixture[str]
) -> None:
    def start(argv, env, log):
        (world.package / "losses.py").write_text("RATE = 7\n")
        return FakeChild(argv, env, log)

    assert world.reproduce(start=start, seeds=1) == 1
    assert world.calls() == ["a/0 fit"]
    assert "has changed since this reproduce began" in capsys.readouterr().err
    assert world.reproduce(seeds=1) == 0
    assert world.calls()[1:] == ALL[:4], "the half of a run with the old code was kept"


@pytest.mark.parametrize(("jobs", "alone", "most"), [(1, False, 1), (2, False, 2), (4, True, 1)])
def test_jobs_run_together_unless_a_run_wants_the_machine_for_itself(
    world: World, jobs: int, alone: bool, most: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    running: list[FakeChild] = []
    seen: list[int] = []
    threads: set[str] = set()

    def start(argv, env, log):
        running[:] = [child for child in running if child.exitcode is None]
        child = FakeChild(argv, env, log)
        running.append(child)
        seen.append(len(running))
        threads.add(env["OMP_NUM_THREADS"])
        return child

    for run in world.body["runs"].values():
        run["overrides"]["model.init_args.steps"] = 10
        run["alone"] = alone
    world.write()
    assert world.reproduce(jobs=jobs, start=start) == 0
    assert max(seen) == most
    assert sorted(world.calls()) == sorted(ALL)
    assert threads == {str(max(1, min(2, 3 // jobs)))}


def test_threads_can_be_chosen(world: World) -> None:
    assert world.reproduce(seeds=1, threads=5) == 0
    assert world.json["threads"] == 5


KILLED = """
import sys
from pathlib import Path
from tests.claims.conftest import FakeChild
from zoo.claims.reader import load_plan
from zoo.commands.reproduce import reproduce
plan = load_plan(Path({claims!r}))
sys.exit(reproduce(plan, [0], (), 1, Path({results!r}), Path({runs!r}), start=FakeChild))
"""


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_a_killed_campaign_goes_on_where_it_was(world: World, number: int) -> None:
    for run in world.body["runs"].values():
        run["overrides"]["model.init_args.steps"] = 30
    world.write()
    code = KILLED.format(claims=str(world.claims), results=str(world.results), runs=str(world.runs))
    path = os.pathsep.join([str(world.root / "site"), str(Path(__file__).parents[2])])
    process = subprocess.Popen(
        [sys.executable, "-c", code], env={**os.environ, "PYTHONPATH": path}, stderr=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL, process_group=0,
    )  # fmt: skip
    halfway = world.runs / "fake" / "cpu" / "b" / "0" / "checkpoints" / "step=10.ckpt"
    end = time.monotonic() + 30
    while not halfway.exists() and time.monotonic() < end:
        time.sleep(0.005)
    os.killpg(process.pid, number) if number == signal.SIGKILL else process.send_signal(number)
    assert process.wait(30) != 0
    assert (world.results / "fake.cpu.md").is_file(), "what is measured already has its page"
    assert world.reproduce(seeds=1) == 0
    assert world.calls() == ["a/0 fit", "a/0 test", "b/0 fit", "b/0 fit resumed", "b/0 test"]
    steps = [int(line) for line in (halfway.parents[1] / "executed").read_text().split()]
    assert steps[-1] == 30
    assert len(steps) <= 31, "more than the step that was being made was lost"


def test_a_run_is_tested_with_its_highest_step_whatever_the_times_of_its_files_are(world: World) -> None:
    folder = world.runs / "checkpoints"
    folder.mkdir(parents=True)
    for time_of_copy, name in enumerate(("step=100.ckpt", "epoch=3-step=20.ckpt", "step=3.ckpt", "last.ckpt")):
        (folder / name).touch()
        os.utime(folder / name, (time_of_copy, time_of_copy))
    assert newest_checkpoint(world.runs) == folder / "step=100.ckpt"
    assert newest_checkpoint(world.runs / "none") is None


def test_a_result_that_a_kill_kept_from_being_written_is_taken(world: World) -> None:
    world.reproduce(seeds=1)
    (world.results / "fake.cpu.json").unlink()
    assert world.reproduce(seeds=1) == 0
    assert world.calls() == ALL[:4]
    assert world.json["runs"]["b"]["0"]["test/acc"] == 0.5


def test_two_campaigns_of_a_method_exclude_each_other(tmp_path: Path) -> None:
    with (
        exclusive(tmp_path / "x"),
        pytest.raises(UsageError, match="another reproduce is at work"),
        exclusive(tmp_path / "x"),
    ):
        pass
    with exclusive(tmp_path / "x"):
        pass


def test_handlers_are_put_back(world: World) -> None:
    before = signal.getsignal(signal.SIGTERM)
    world.reproduce(seeds=1)
    assert signal.getsignal(signal.SIGTERM) is before
