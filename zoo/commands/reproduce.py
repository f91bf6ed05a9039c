"""run the claims of a method and judge them"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from zoo.claims.campaign import LOG, Campaign, exclusive, fingerprints, plan_tasks, tasks_to_make
from zoo.claims.display import Display
from zoo.claims.plan import Plan
from zoo.claims.reader import find_claims, load_plan
from zoo.claims.results import (
    OVERALL,
    REWRITE,
    Results,
    difference_text,
    method_markdown,
    notes_of,
    number,
    overall_markdown,
    read_all,
    side_text,
    write_pages,
)
from zoo.errors import UsageError
from zoo.output import table_console

DESCRIPTION = """\
Make the runs that a method's claims.yaml lists, those only that are missing or stale, and judge its claims. It can be
stopped at any time; the same command goes on. Writes METHOD.SCALE.json, .md and .png and README.md into the results
folder. Runs log to W&B only if WANDB_MODE is set.
"""


def main(argv: list[str]) -> int:
    """Make runs, or check or print what was measured; exit code 1 if a run failed or the check did."""
    parser = argparse.ArgumentParser(prog="zoo reproduce", description=DESCRIPTION)
    parser.add_argument("name", nargs="?", help="method, or path of a claims.yaml; optional for --check and --table")
    parser.add_argument("--scale", default="", help="scale of the claims file (default: its first one)")
    parser.add_argument("--seeds", type=int, metavar="N", help="only the first N seeds")
    parser.add_argument("--only", action="append", metavar="ID", help="only what this claim needs; may be repeated")
    parser.add_argument("--jobs", type=int, default=1, metavar="N", help="runs at once")
    parser.add_argument("--threads", type=int, metavar="N", help="threads of each run (default: its share, at most 2)")
    parser.add_argument(
        "--check", action="store_true", help="run nothing: are the results complete, current, and do all hold?"
    )
    parser.add_argument("--allow-failing", action="store_true", help="--check accepts claims that fail and have a note")
    parser.add_argument("--table", action="store_true", help="run nothing: judge again and write pages and figures")
    parser.add_argument("--results", type=Path, default=Path("results"), metavar="DIR", help="default: results")
    parser.add_argument(
        "--runs", type=Path, default=Path("runs/reproduce"), metavar="DIR", help="default: runs/reproduce"
    )
    args = parser.parse_args(argv)
    for option in ("jobs", "threads"):
        if (value := getattr(args, option)) is not None and value < 1:
            raise UsageError(f"--{option} {value}: at least 1")
    if args.check or args.table:
        plans = [load_plan(find_claims(args.name), args.scale)] if args.name else measured_plans(args.results)
        return (
            check(plans, args.results, args.allow_failing, not args.name)
            if args.check
            else rewrite(plans, args.results)
        )
    if args.name is None:
        raise UsageError("which method?", "zoo reproduce NAME; zoo list shows the names")
    plan = load_plan(find_claims(args.name), args.scale)
    if args.seeds is not None and not 1 <= args.seeds <= len(plan.seeds):
        raise UsageError(f"--seeds {args.seeds}: {plan.path} lists {len(plan.seeds)}", "add seeds to the claims file")
    seeds, only = plan.seeds[: args.seeds], args.only or []
    return reproduce(plan, seeds, only, args.jobs, args.results, args.runs, threads=args.threads)


def measured_plans(results: Path) -> list[Plan]:
    """Return the plan of each results file."""
    return [load_plan(find_claims(r["method"]), r["scale"]) for r in read_all(results)]


def reproduce(
    plan: Plan,
    seeds: Sequence[int],
    only: Sequence[str],
    jobs: int,
    results_dir: Path,
    runs_dir: Path,
    **options: Any,
) -> int:
    """Make what is missing for the claims `only` (all if empty) and write the results after each run.

    Args:
        plan: The plan.
        seeds: Seeds to run.
        only: Ids of claims.
        jobs: Runs at once.
        results_dir: Folder of the results.
        runs_dir: Folder of the run directories.
        options: Further options of `Campaign`.

    Returns:
        0 if every run has finished, whatever the verdicts; 1 if one failed.
    """
    results = Results(plan, results_dir, fingerprints(plan, plan.seeds))
    chosen = {run.name for run in plan.needed(only)} if only else set(plan.runs)
    with exclusive(runs_dir / plan.method / plan.scale):
        tasks = [task for task in plan_tasks(plan, seeds, runs_dir) if task.run.name in chosen]
        wanted = tasks_to_make(tasks, lambda task: results.recorded(task.run.name, task.seed))
        for task in wanted:
            results.drop(task.run.name, task.seed)
        display = Display(results, tasks, wanted, jobs)
        for task in tasks:
            # finished, but killed before it was written down
            if task not in wanted and not results.recorded(task.run.name, task.seed):
                display.take(task)
        with display:
            failures = Campaign(tasks, plan, display, jobs, **options).make(wanted)
    results.write()
    write_pages(results_dir)
    show_claims(results.content["claims"])
    for task, reason in failures.items():
        print(f"\n{task} failed ({task.directory / LOG}):\n{reason}", file=sys.stderr)
    for line in results.problems():
        print(f"not complete: {line}", file=sys.stderr)
    print(f"\nwritten: {results.path.with_suffix('.md')}")
    return 1 if failures else 0


def check(plans: Sequence[Plan], results_dir: Path, allow_failing: bool, everything: bool) -> int:
    """Say whether the results are complete, of the present config and code, and which claims hold.

    Returns:
        0 only if nothing is missing or stale and every claim holds, or fails and has a note where that is allowed.
    """
    good = True
    for plan in plans:
        results = Results(plan, results_dir, fingerprints(plan, plan.seeds))
        problems = results.problems()
        claims = results.judged()
        page = results.path.with_suffix(".md")
        if results.content and not problems:
            text = method_markdown(results.content, page.with_suffix(".png").is_file())
            if not page.is_file() or page.read_text(encoding="utf-8") != text:
                problems.append(f"{page} is not what the JSON file says: {REWRITE}")
        print(f"{plan.method} ({plan.scale})")
        for line in problems:
            print(f"  stale: {line}")
        show_claims(claims)
        accepted = [c["holds"] or (allow_failing and c["holds"] is False and c["note"]) for c in claims]
        good = good and not problems and all(accepted)
    if everything:
        page = results_dir / OVERALL
        if (page.read_text(encoding="utf-8") if page.is_file() else "") != overall_markdown(read_all(results_dir)):
            print(f"stale: {page} is not what the JSON files say: {REWRITE}")
            good = False
    return 0 if good else 1


def rewrite(plans: Sequence[Plan], results_dir: Path) -> int:
    """Judge the recorded runs by the present claims files and write all pages."""
    for plan in plans:
        results = Results(plan, results_dir, fingerprints(plan, plan.seeds))
        results.write()
    for path in write_pages(results_dir):
        print(path)
    return 0


def show_claims(claims: Sequence[Mapping[str, Any]]) -> None:
    """Print a table of judged claims."""
    from rich.table import Table

    if not claims:
        return
    table = Table(box=None, pad_edge=False)
    for column in ("claim", "left", "right", "left − right", "margin", "holds"):
        table.add_column(column, overflow="fold", no_wrap=column in ("margin", "holds"))
    verdicts = {True: "[green]yes[/green]", False: "[red]no[/red]", None: "[yellow]open[/yellow]"}
    for claim in claims:
        table.add_row(
            claim["id"], *(side_text(claim[side], between="\n") for side in ("left", "right")),
            difference_text(claim).replace(", ", "\n"), number(claim["margin"]), verdicts[claim["holds"]],
        )  # fmt: skip
    console = table_console()
    console.print(table)
    for claim in claims:
        for note in notes_of(claim):
            console.print(f"  {claim['id']}: {note}", style="dim", markup=False, highlight=False)
