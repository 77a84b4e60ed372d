"""`poemerge models`: what is registered."""

from __future__ import annotations

import argparse
import json

__all__ = ["add_parser", "run"]

DESCRIPTION = """\
Lists the registered versions, newest first: aliases, mean accuracy, share of the experts' accuracy kept, digest,
number of experts (and of those skipped, which are told below with the revision they keep), and what the gates said.
`poemerge lineage VERSION` names the experts.

example:
  $ poemerge models
  poemerge-demo

    version   aliases               accuracy   normalised   digest         experts   gates
   ─────────────────────────────────────────────────────────────────────────────────────────
          1   candidate, champion     0.8543       0.9926   2c7193f88561         7   passed
"""


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Adds the command."""
    parser = subparsers.add_parser(
        "models",
        help="list registered versions",
        description=DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument(
        "--decisions", action="store_true", help="print the log of decisions instead: who, when, what, why"
    )
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Prints the versions, or the decisions."""
    from dataclasses import asdict

    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    from poemerge.cli.console import plain_console
    from poemerge.project import Project
    from poemerge.registry.journal import Journal
    from poemerge.registry.tracking import connect, speaking, tracking_uri
    from poemerge.registry.versions import list_versions

    project = Project.find()
    model = project.load_params().register_.model
    client = connect(project)
    with speaking(tracking_uri(project)):
        versions = list_versions(client, model)
        journal = Journal.find(client, model) if args.decisions else None
        lines = journal.lines() if journal is not None else []
    if args.json:
        content = [asdict(line) for line in lines] if args.decisions else [version.to_json() for version in versions]
        print(json.dumps(content, indent=2, ensure_ascii=False))
        return 0
    console = plain_console()
    if not versions:
        console.print(f"{model}: nothing is registered yet; `poemerge run` registers the first version")
        return 0
    if args.decisions:
        table = Table(title=model, title_justify="left", box=SIMPLE_HEAD)
        for name in ("", "when", "what", "version", "champion before", "who", "why"):
            table.add_column(name, overflow="fold")
        for line in lines:
            when = line.at[:16].replace("T", " ")
            table.add_row(str(line.number), when, line.action, line.version, line.champion or "", line.by, line.reason)
        console.print(table)
        return 0
    table = Table(title=model, title_justify="left", box=SIMPLE_HEAD)
    for name in ("version", "aliases", "accuracy", "normalised", "digest", "experts", "gates"):
        right = name in ("version", "accuracy", "normalised", "experts")
        table.add_column(name, justify="right" if right else "left", no_wrap=name != "gates")
    for version in versions:
        failed = [name for name, text in version.gates.items() if text.startswith("fail")]
        table.add_row(
            version.version,
            ", ".join(version.aliases),
            _figure(version.mean.get("merged")),
            _figure(version.mean.get("normalised")),
            version.digest[:12],
            f"{len(version.experts)}, {len(version.skipped)} skipped" if version.skipped else str(len(version.experts)),
            f"{', '.join(failed)} failed" if failed else "passed" if version.gates else "not judged",
        )
    console.print(table)
    for version in versions:
        for name, facts in version.skipped.items():
            keeps = f"keeps {facts['keeps']}" if facts["keeps"] else "left out"
            told = f"version {version.version}, expert {name} skipped, {keeps}: {facts['reason']}"
            console.print(told, markup=False, soft_wrap=True)
    for version in versions[:1]:
        for name, text in version.gates.items():
            if text.startswith("fail"):
                console.print(f"version {version.version}, gate {name}: {text.removeprefix('fail: ')}")
    return 0


def _figure(value: float | None) -> str:
    return "" if value is None else f"{value:.4f}"
