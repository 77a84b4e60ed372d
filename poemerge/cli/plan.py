"""`poemerge plan`: what a run would do and why, without doing it."""

from __future__ import annotations

import argparse

__all__ = ["add_parser", "run"]

DESCRIPTION = """\
Say what `poemerge run` would do now, and why. Nothing is written and nothing is fetched.

$ poemerge plan
merge         runs     17 s  parameter merge.scale_factor: 0.1 → 0.2
evaluate      perhaps  41 s  stage merge comes before it
register      perhaps   9 s  stage merge comes before it; stage evaluate comes before it

A stage that runs perhaps runs only if the stages before it change its inputs.
"""


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add `plan` to the command line."""
    parser = subparsers.add_parser(
        "plan",
        help="what a run would do, and why",
        description=DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--json", action="store_true", help="print the plan as JSON")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Print the plan; 0 whether there is work or not."""
    import json

    from rich.table import Table

    from poemerge.cli.console import plain_console
    from poemerge.cli.dvc import dvc_status
    from poemerge.planning import make_plan
    from poemerge.preflight import preflight
    from poemerge.project import Project

    project = Project.find()
    plan = make_plan(project, preflight(project), dvc_status(project))
    if args.json:
        print(json.dumps(plan.as_json(), indent=2, ensure_ascii=False))
        return 0
    console = plain_console()
    for name, why in {**plan.skipped, **plan.waiting}.items():
        console.print(f"{name} is not taken: {why}", markup=False, soft_wrap=True)
    if not plan.has_work:
        console.print("Nothing to do.")
        return 0
    table = Table(box=None, show_header=False, pad_edge=False)
    for stage in plan.stages:
        if stage.work != "none":
            took = "" if stage.seconds is None else f"{stage.seconds:.0f} s"
            why = "; ".join(f"{reason.kind} {reason.what}" for reason in stage.reasons)
            table.add_row(stage.stage, "runs" if stage.work == "run" else "perhaps", took, why)
    console.print(table)
    return 0
