"""What came of a run, in the words of somebody who must decide: the scores, the gates, where to read on."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from poemerge.cli.console import plain_console
from poemerge.project import Project

if TYPE_CHECKING:
    from poemerge.registry.standing import Standing

__all__ = ["say_verdict", "score_table"]


COLOURS = {"pass": "green", "fail": "red", "skip": "dim"}


def score_table(project: Project) -> Table | None:
    """Task × base, expert, merged, normalised, from metrics/evaluation.json; None where that is not there."""
    evaluation = _read(project.evaluation_json)
    if evaluation is None:
        return None
    table = Table(title="Scores on the test splits", title_justify="left")
    table.add_column("task")
    for heading in ("base", "expert", "merged", "normalised"):
        table.add_column(heading, justify="right")
    baselines = list(evaluation["mean"].get("baselines", {}))
    for name in baselines:
        table.add_column(name, justify="right", style="dim")
    for task, scores in evaluation["suites"].items():
        table.add_row(
            escape(task),
            *(_number(scores.get(key)) for key in ("base", "expert", "merged", "normalised")),
            *(_number(scores.get("baselines", {}).get(name)) for name in baselines),
        )
    mean = evaluation["mean"]
    table.add_section()
    table.add_row(
        "mean",
        *(_number(mean.get(key)) for key in ("base", "expert", "merged", "normalised")),
        *(_number(_accuracy(mean["baselines"][name])) for name in baselines),
        style="bold",
    )
    return table


def say_verdict(project: Project, console: Console | None = None, *, approval: str | None = None) -> None:
    """Print the scores, the registered version, each gate's verdict, and where the report and the pages are.

    Arguments: `approval`, what the flow says became of an approval that is needed.
    """
    from poemerge.registry.standing import standing

    console = console or plain_console()
    table = score_table(project)
    if table is not None:
        console.print(table)
    registration = _read(project.registration_json)
    if registration is not None:
        now = standing(project, registration)
        aliases = ", ".join(now.aliases) or "no alias"
        console.print(
            f"{escape(registration['model'])} version {registration['version']} ({aliases}), "
            f"digest {registration['digest'][:12]}"
        )
        for gate in registration["gates"]:
            verdict = f"[{COLOURS.get(gate['verdict'], 'default')}]{gate['verdict']:<5}[/]"
            console.print(f"  {verdict} {escape(gate['name'])}: {escape(gate['reason'])}", soft_wrap=True)
        decision = _decision(registration, now, approval)
        taken_back = "champion" in registration["aliases"] and now.champion != registration["version"]
        gain = None if taken_back else _gain(registration)
        console.print(f"{decision} {gain}" if gain else decision, style="bold", soft_wrap=True)
        if now.note:
            console.print(f"Registry: {escape(now.note)}", soft_wrap=True)
    if project.report_html.is_file():
        console.print(f"Report: {project.report_html}", soft_wrap=True)
    console.print("Pages:  `poemerge ui` opens Prefect's and MLflow's")


def _decision(registration: dict[str, Any], now: Standing, approval: str | None) -> str:
    version, before = registration["version"], registration.get("champion_before")
    was = "champion" in registration["aliases"]
    if now.champion == version:
        if was and not registration["promoted"]:
            return f"Version {version} stays champion."
        return f"Version {version} is champion" + ("." if before in (None, version) else f"; it was {before}.")
    if was:
        return f"Version {version} is champion no longer; {_champion(now)}."
    if approval == "requested":
        return f"Version {version} waits for approval: `poemerge approve {version}`, or `poemerge reject {version}`."
    if approval == "by hand":
        return f"Version {version} passed every gate and needs approval: `poemerge promote {version}` asks for it."
    stays = now.champion is not None and now.champion == before
    return f"Version {version} is a candidate; {f'version {before} stays champion' if stays else _champion(now)}."


def _champion(now: Standing) -> str:
    return "there is no champion" if now.champion is None else f"version {now.champion} is champion"


def _gain(registration: dict[str, Any]) -> str | None:
    """By how much the candidate is ahead of the champion that it was judged against, and how sure that is."""
    figures: dict[str, Any] = next((gate["figures"] for gate in registration["gates"] if gate["name"] == "mean"), {})
    if "gain" not in figures:
        return None
    text = f"Mean normalised score {figures['gain']:+.4f} against the champion before"
    if "interval" not in figures:
        return f"{text}."
    low, high = figures["interval"]
    sure = "inside the noise" if low <= 0 <= high else "more than chance explains"
    return f"{text}, interval {low:+.4f} to {high:+.4f}: {sure}."


def _accuracy(baseline: Any) -> float | None:
    return baseline.get("accuracy") if isinstance(baseline, dict) else baseline


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.3f}"


def _read(path: Path) -> dict[str, Any] | None:
    try:
        read: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    return read
