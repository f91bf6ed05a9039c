"""Progress of a campaign at the terminal, and the results file kept up to date with it."""

from __future__ import annotations

import re
import statistics
from collections.abc import Mapping, Sequence

from zoo.claims.campaign import LOG, MARKER, Observer, Task
from zoo.claims.results import Results, number, write_texts
from zoo.output import table_console
from zoo.runs import read_json


class Display(Observer):
    """Progress of a campaign, and the results file kept up to date with it.

    Bars at a terminal, one line for each finished run elsewhere.

    Args:
        results: The results file.
        tasks: All tasks.
        wanted: Those that are made now.
        jobs: How many at once.
    """

    def __init__(self, results: Results, tasks: Sequence[Task], wanted: Sequence[Task], jobs: int) -> None:
        from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

        self.results, self.wanted, self.jobs = results, list(wanted), jobs
        self.done = 0
        seconds = results.content.get("seconds", {})
        self.known = {name: list(by_seed.values()) for name, by_seed in seconds.items()}
        self.console = table_console()
        self.progress = Progress(
            TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[text]}"), TimeElapsedColumn(),
            console=self.console, disable=not self.console.is_terminal, transient=True,
        )  # fmt: skip
        self.overall = self.progress.add_task(f"{len(wanted)} runs", total=max(1, len(wanted)), text="")
        self.bars: dict[Task, TaskID] = {}
        self.say(f"{results.plan.method}, {results.plan.scale} scale: {len(wanted)} of {len(tasks)} runs to make")

    def __enter__(self) -> Display:
        self.progress.start()
        return self

    def __exit__(self, *error: object) -> None:
        self.progress.stop()

    def say(self, text: str) -> None:
        """Print a line above the bars."""
        self.console.print(text, markup=False, highlight=False, soft_wrap=True)

    def take(self, task: Task) -> None:
        """Write a finished task into the results file."""
        marker = read_json(task.directory / MARKER)
        self.results.record(task.run.name, task.seed, task.summary, marker.get("claims", {}), task.resumed)
        self.results.write()
        write_texts(self.results.path.parent)

    def started(self, task: Task, resumed: bool) -> None:
        if task not in self.bars:
            self.bars[task] = self.progress.add_task(f"  {task}", total=1.0, text="resumed" if resumed else "")
            if resumed:
                self.say(f"  {task}: goes on from its last checkpoint")

    def tick(self, active: Mapping[Task, float]) -> None:
        shares = {task: fraction(task, seconds, self.expected(task)) for task, seconds in active.items()}
        for task, share in shares.items():
            self.progress.update(self.bars[task], completed=share or 0.0)
        self.progress.update(
            self.overall, completed=self.done + sum(s or 0.0 for s in shares.values()), text=self.left(active)
        )

    def expected(self, task: Task) -> float | None:
        """Return how long a task should take, going by runs of its name, then by all."""
        values = self.known.get(task.run.name) or [v for values in self.known.values() for v in values]
        return statistics.fmean(values) if values else None

    def left(self, active: Mapping[Task, float]) -> str:
        """Return the time left in words, `""` before anything is known."""
        pending = self.wanted[:]
        times = [self.expected(task) for task in pending]
        if not times or any(t is None for t in times):
            return ""
        total = sum(max(0.0, (t or 0.0) - active.get(task, 0.0)) for task, t in zip(pending, times, strict=True))
        total /= min(self.jobs, len(pending))
        return f"about {total / 60:.0f} min left" if total >= 90 else f"about {total:.0f} s left"

    def finished(self, task: Task) -> None:
        self.take(task)
        summary = task.summary
        self.known.setdefault(task.run.name, []).append(float(summary["seconds"]))
        self._over(task)
        shown = {
            side.metric for c in self.results.plan.claims for side in (c.left, c.right) if side.run == task.run.name
        }
        metrics = "  ".join(f"{m} {number(summary['metrics'].get(m))}" for m in sorted(shown))
        self.say(f"[{self.done}/{self.total}] {task}: {summary['seconds']:.0f} s  {metrics}  {self.left({})}".rstrip())

    def failed(self, task: Task, reason: str) -> None:
        self._over(task)
        self.say(f"[{self.done}/{self.total}] {task}: failed, {reason.splitlines()[0]}")

    def stopping(self) -> None:
        self.say("stopping; the runs write their checkpoints, the same command goes on with them")

    @property
    def total(self) -> int:
        """Number of runs that are made now."""
        return self.done + len(self.wanted)

    def _over(self, task: Task) -> None:
        self.done += 1
        self.wanted.remove(task)
        bar = self.bars.pop(task, None)
        if bar is not None:
            self.progress.remove_task(bar)


def fraction(task: Task, seconds: float, expected: float | None) -> float | None:
    """Return how much of a run is done: by the last `step n/total` of its log, else by its expected time."""
    log = task.directory / LOG
    if log.is_file():
        with log.open("rb") as file:
            file.seek(max(0, log.stat().st_size - 4096))
            steps = re.findall(rb"^step (\d+)/(\d+)", file.read(), flags=re.MULTILINE)
        if steps:
            return min(1.0, int(steps[-1][0]) / max(1, int(steps[-1][1])))
    return None if not expected else min(0.95, seconds / expected)
