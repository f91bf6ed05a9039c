"""`results/<method>.<scale>.json` and what is made from it: a table for each method, and one over all of them."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from zoo.claims.fingerprint import digest
from zoo.claims.judge import judge, spread
from zoo.claims.plan import Plan
from zoo.runs import read_json, write_atomically

OVERALL = "README.md"
REWRITE = "zoo reproduce NAME --table writes them again"
GENERATED = "Made by `zoo reproduce` from {source}; not to be edited."


class Results:
    """What was measured for one scale of a method.

    Args:
        plan: The plan.
        directory: Folder of the results.
        fingerprints: Run -> seed -> hash of what a result depends on at present.
    """

    def __init__(self, plan: Plan, directory: Path, fingerprints: Mapping[str, Mapping[int, str]]) -> None:
        self.plan, self.fingerprints = plan, fingerprints
        self.path = directory / f"{plan.method}.{plan.scale}.json"
        self.content = read_json(self.path)

    def recorded(self, run: str, seed: int) -> bool:
        """Whether there is a result of the present config and code."""
        return self._fingerprint(run, seed) == self.fingerprints[run][seed]

    def _fingerprint(self, run: str, seed: int) -> str:
        entry = self.content.get("provenance", {}).get(run, {}).get(str(seed), {})
        return str(entry.get("fingerprint", ""))

    def record(
        self, run: str, seed: int, summary: Mapping[str, Any], claims: Mapping[str, str], resumed: int = 0
    ) -> None:
        """Take over the outcome of a run from its `summary.json`.

        Args:
            run: Name of the run.
            seed: Its seed.
            summary: The summary.
            claims: Claim id -> hash of its terms when the run began.
            resumed: How often the run went on after a stop; its seconds are then those of the last part.
        """
        name, hardware = str(seed), summary.get("hardware", {})
        metrics = {k: v if v is None or math.isfinite(v) else None for k, v in sorted(summary["metrics"].items())}
        self.content.setdefault("runs", {}).setdefault(run, {})[name] = metrics
        self.content.setdefault("seconds", {}).setdefault(run, {})[name] = round(float(summary["seconds"]), 1)
        self.content.setdefault("provenance", {}).setdefault(run, {})[name] = {
            "fingerprint": self.fingerprints[run][seed],
            "commit": summary.get("commit", ""),
            "hardware": hardware_name(hardware),
            "threads": hardware.get("threads"),
            "claims": dict(claims),
            "resumed": resumed,
        }
        for key in ("hardware", "versions", "commit"):
            self.content[key] = summary.get(key, "" if key == "commit" else {})
        self.content["threads"] = hardware.get("threads")

    def drop(self, run: str, seed: int) -> None:
        """Forget a result that is about to be made again, so that no claim is judged on two versions of the code."""
        for key in ("runs", "seconds", "provenance"):
            self.content.get(key, {}).get(run, {}).pop(str(seed), None)

    def problems(self) -> list[str]:
        """Say what is missing, stale or no longer what the claims file says."""
        out = []
        for name in self.plan.runs:
            missing = [s for s in self.plan.seeds if not self._fingerprint(name, s)]
            stale = [s for s in self.plan.seeds if self._fingerprint(name, s) and not self.recorded(name, s)]
            out += [f"{name}: no result for seed {', '.join(map(str, missing))}"] if missing else []
            out += [f"{name}: config or code changed since seed {', '.join(map(str, stale))} ran"] if stale else []
        if not out and (self.judged() != self.content.get("claims") or self.reports() != self.content.get("reports")):
            out.append(f"the verdicts do not follow from runs and claims file any more: {REWRITE}")
        return out

    def judged(self) -> list[dict[str, Any]]:
        """Judge the claims of the plan on what is recorded."""
        runs, provenance = self.content.get("runs", {}), self.content.get("provenance", {})
        out = []
        for claim in self.plan.claims:
            entry = judge(claim, runs, self.plan.seeds)
            known = [provenance.get(r, {}).get(s, {}).get("claims", {}) for r in claim.runs for s in entry["per_seed"]]
            entry["fixed_before_runs"] = all(terms.get(claim.id) == digest(claim.terms) for terms in known)
            out.append(entry)
        return out

    def reports(self) -> list[dict[str, Any]]:
        """Return the further metrics of the plan with mean and spread over the recorded seeds."""
        return [
            {"statement": r.statement, "paper": r.paper, "values": self._values(r.runs, r.metrics)}
            for r in self.plan.reports
        ]

    def _values(self, runs: Sequence[str], metrics: Sequence[str]) -> list[dict[str, Any]]:
        out = []
        for run in runs:
            seeds = self.content.get("runs", {}).get(run, {})
            for metric in metrics:
                values = [float("nan") if v[metric] is None else v[metric] for v in seeds.values() if metric in v]
                mean, std = spread(values)
                out.append({"run": run, "metric": metric, "mean": mean, "std": std, "seeds": len(values)})
        return out

    def write(self) -> None:
        """Judge the claims and write the JSON file in one step."""
        for key in ("runs", "seconds", "provenance"):
            self.content[key] = self._planned(self.content.get(key, {}))
        claims, reports = self.judged(), self.reports()
        seeds = sorted({int(seed) for of_run in self.content["runs"].values() for seed in of_run})
        order = ("hardware", "threads", "versions", "commit")
        content = {
            "method": self.plan.method,
            "scale": self.plan.scale,
            "seeds": seeds,
            **{key: self.content.get(key) for key in order},
            "code_hash": digest(self.fingerprints),
            "runs": self.content["runs"],
            "seconds": self.content["seconds"],
            "claims": claims,
            "reports": reports,
            "provenance": self.content["provenance"],
        }
        self.content = content
        self.path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(self.path, json.dumps(content, indent=1, allow_nan=False) + "\n")

    def _planned(self, by_run: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
        """Drop runs and seeds that the plan no longer has."""
        kept = {n: [s for s in map(str, self.plan.seeds) if s in by_run.get(n, {})] for n in self.plan.runs}
        return {name: {seed: by_run[name][seed] for seed in seeds} for name, seeds in kept.items() if seeds}


def read_all(directory: Path) -> list[dict[str, Any]]:
    """Return the results files of a folder, sorted by name."""
    return [read_json(path) for path in sorted(directory.glob("*.*.json"))]


def hardware_name(hardware: Mapping[str, Any]) -> str:
    """Return processor or accelerators and threads in a few words."""
    gpus = hardware.get("gpus") or []
    if gpus:
        return f"{len(gpus)} × {gpus[0]}" if len(gpus) > 1 else str(gpus[0])
    threads = hardware.get("threads")
    return f"{hardware.get('cpu', 'unknown')}" + (f", {threads} threads" if threads and threads > 1 else "")


def number(value: float | None, signed: bool = False) -> str:
    """Return a number with four digits, an en dash where there is none."""
    if value is None:
        return "–"
    return f"{value:{'+' if signed else ''}.4g}"


def plus_minus(mean: float | None, std: float | None, signed: bool = False) -> str:
    """Return `mean ± std`, two digits of the standard deviation and as many decimals of the mean."""
    if mean is None or not std:
        return number(mean, signed)
    decimals = max(0, 1 - math.floor(math.log10(std)))
    return f"{mean:{'+' if signed else ''}.{decimals}f} ± {std:.{decimals}f}"


def difference_text(claim: Mapping[str, Any]) -> str:
    """Return the difference of a judged claim: mean and spread, and what is judged where that is not the mean."""
    text = plus_minus(claim["mean"], claim["std"], signed=True)
    other = claim["aggregate"] != "mean" and claim["std"] is not None
    return f"{text}, {claim['aggregate']} {number(claim['value'], signed=True)}" if other else text


def verdict(claim: Mapping[str, Any]) -> str:
    """Return `yes`, `**no**` or `open` for a judged claim."""
    return {True: "yes", False: "**no**", None: "open"}[claim["holds"]]


def side_text(side: Mapping[str, Any] | float, between: str = " ") -> str:
    """Return one side of a judged claim with its value, separated by `between`."""
    if not isinstance(side, Mapping):
        return number(side)
    factor = f"{side['times']:g} × " if "times" in side else ""
    aggregate = f"{side['aggregate']} of " if "aggregate" in side else ""
    return f"{factor}{aggregate}{side['run']}{between}{plus_minus(side['mean'], side['std'])}"


def metric_of(claim: Mapping[str, Any]) -> str:
    """Return the metric, or the metrics, that a judged claim compares."""
    sides = [side["metric"] for side in (claim["left"], claim["right"]) if isinstance(side, Mapping)]
    return " / ".join(dict.fromkeys(sides))


def seconds_of(result: Mapping[str, Any], names: Iterable[str]) -> float:
    """Return how long the runs `names` took together, all seeds."""
    # exact: in the order of a set, a sum would differ in its last digit from process to process
    return math.fsum(value for name in set(names) for value in result["seconds"].get(name, {}).values())


def runs_of(claim: Mapping[str, Any]) -> list[str]:
    """Return the runs that a judged claim compares."""
    return [side["run"] for side in (claim["left"], claim["right"]) if isinstance(side, Mapping)]


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(
        "| " + " | ".join(cell.replace("|", "\\|").replace("\n", " ") for cell in row) + " |" for row in lines
    )


def notes_of(claim: Mapping[str, Any]) -> list[str]:
    """Return what has to be said about a judged claim besides its numbers."""
    out = [text for text in (claim["problem"], claim["note"]) if text]
    if not claim["fixed_before_runs"]:
        out.append("the margin was set or changed after some of its runs")
    return out


def was_resumed(result: Mapping[str, Any], run: str) -> bool:
    """Return whether a run was stopped and went on for some seed."""
    return any(entry["resumed"] for entry in result["provenance"].get(run, {}).values())


def method_markdown(result: Mapping[str, Any], figure: bool) -> str:
    """Return the page of one results file."""
    name = f"{result['method']}.{result['scale']}"
    versions = ", ".join(f"{k} {v}" for k, v in (result["versions"] or {}).items())
    total = seconds_of(result, result["runs"])
    lines = [
        f"# {result['method']}, {result['scale']} scale",
        "",
        GENERATED.format(source=f"`{name}.json`"),
        "",
        f"Seeds {', '.join(map(str, result['seeds']))}; {hardware_name(result['hardware'] or {})}; {versions}; "
        f"commit {result['commit'] or 'unknown'}; {total:.0f} s in all.",
        "",
    ]
    if figure:
        lines += [f"![measured values and claims]({name}.png)", ""]
    if result["claims"]:
        rows = [
            [
                c["statement"], verdict(c), side_text(c["left"]), side_text(c["right"]), difference_text(c),
                f"{c['margin']:g}", metric_of(c), c["paper"],
            ]
            for c in result["claims"]
        ]  # fmt: skip
        header = ["claim", "holds", "left", "right", "left − right", "margin", "metric", "paper"]
        lines += ["## Claims", "", "Differences are paired by seed; ± is the standard deviation over seeds.", ""]
        lines += [table(header, rows), ""]
        notes = [f"- {c['id']}: {'; '.join(notes_of(c))}" for c in result["claims"] if notes_of(c)]
        lines += [*notes, ""] if notes else []
    for report in result["reports"]:
        rows = [[v["run"], v["metric"], plus_minus(v["mean"], v["std"]), str(v["seeds"])] for v in report["values"]]
        lines += [f"## {report['statement']}", "", f"Paper: {report['paper']}", ""] if report["paper"] else [
            f"## {report['statement']}", ""
        ]  # fmt: skip
        lines += [table(["run", "metric", "mean ± std", "seeds"], rows), ""]
    rows = [
        [run, str(len(seeds)), f"{'> ' * was_resumed(result, run)}{sum(seeds.values()) / len(seeds):.0f}"]
        for run, seeds in result["seconds"].items()
    ]
    lines += ["## Runs", "", table(["run", "seeds", "seconds each"], rows), ""]
    if any(was_resumed(result, run) for run in result["seconds"]):
        lines += [">: stopped and resumed; only the last part was timed.", ""]
    return "\n".join(lines)


def overall_markdown(results: Sequence[Mapping[str, Any]]) -> str:
    """Return the table over all results files."""
    rows = [
        [
            f"[{r['method']}]({r['method']}.{r['scale']}.md)", c["statement"], verdict(c),
            f"{side_text(c['left'])}; {side_text(c['right'])}; {difference_text(c)} (margin {c['margin']:g})",
            c["paper"], str(len(c["per_seed"])), hardware_name(r["hardware"] or {}), f"{seconds_of(r, runs_of(c)):.0f}",
        ]
        for r in results
        for c in r["claims"]
    ]  # fmt: skip
    holding = sum(c["holds"] is True for r in results for c in r["claims"])
    lines = ["# Measured claims", "", GENERATED.format(source="the JSON files of this folder"), ""]
    if not rows:
        return "\n".join([*lines, "Nothing has been measured yet.", ""])
    header = ["method", "claim", "holds", "ours", "paper", "seeds", "hardware", "seconds"]
    return "\n".join([*lines, f"{holding} of {len(rows)} claims hold.", "", table(header, rows), ""])


def write_pages(directory: Path) -> list[Path]:
    """Write page and figure of each results file, and the overall table; return what was written."""
    from zoo.claims.figures import draw

    figures = [figure for result in read_all(directory) if draw(result, figure := beside(directory, result, "png"))]
    return [*figures, *write_texts(directory)]


def write_texts(directory: Path) -> list[Path]:
    """Write the page of each results file, with its figure if there is one, and the overall table."""
    results = read_all(directory)
    texts = {
        beside(directory, result, "md"): method_markdown(result, beside(directory, result, "png").is_file())
        for result in results
    }
    texts[directory / OVERALL] = overall_markdown(results)
    directory.mkdir(parents=True, exist_ok=True)
    for path, text in texts.items():
        write_atomically(path, text)
    return list(texts)


def beside(directory: Path, result: Mapping[str, Any], suffix: str) -> Path:
    """Return the file with another suffix that belongs to a results file."""
    return directory / f"{result['method']}.{result['scale']}.{suffix}"
