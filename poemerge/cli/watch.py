"""`poemerge watch`: look at the sources, in this terminal, and re-merge when something lands."""

from __future__ import annotations

import argparse

__all__ = ["add_parser", "run"]

DESCRIPTION = """\
Look at every source each `schedule.watch.interval_seconds`, and re-merge when something landed, until Ctrl-C: what
`poemerge serve` does, without a server that stays. A re-merge that fails is told, and tried again after 5 minutes, half
an hour and three hours, and at the next landing.

$ poemerge watch
Looking each 60 s
tweets landed: models:/tweets@champion, 4 → 5
...

$ poemerge watch --once --json
[{"name": "tweets", "source": "models:/tweets@champion", "old": "4", "new": "5"}]

--once looks once, tells what landed since the last merge, and changes nothing.
"""


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add `watch` to the command line."""
    parser = subparsers.add_parser(
        "watch",
        help="look at the sources, re-merge when something lands",
        description=DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--once", action="store_true", help="look once, tell what landed, change nothing")
    parser.add_argument("--json", action="store_true", help="with --once: print it as JSON")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Look once, or until Ctrl-C."""
    import json
    import subprocess
    import sys
    import time

    from poemerge.cli.flows import ended_by_sigterm
    from poemerge.errors import PoemergeError
    from poemerge.landings import due, landed, note_told
    from poemerge.preflight import preflight
    from poemerge.project import Project
    from poemerge.sources import Change

    project = Project.find()
    params = preflight(project)

    def told(change: Change) -> str:
        return f"{change.name} landed: {change.source}, {change.old or 'nothing'} → {change.new or 'nothing'}"

    if args.once:
        changes = landed(project)
        if args.json:
            keys = ("name", "source", "old", "new")
            print(json.dumps([{key: getattr(change, key) for key in keys} for change in changes], indent=2))
        else:
            print("\n".join(map(told, changes)) or "Nothing landed.")
        return 0
    watch = params.schedule.watch
    print(f"Looking each {watch.interval_seconds} s", flush=True)
    with ended_by_sigterm():
        while True:
            try:
                changes = due(project, landed(project))
            except PoemergeError as error:
                print(error, file=sys.stderr, flush=True)
                changes = []
            if changes:
                print("\n".join(map(told, changes)), flush=True)
                note_told(project, changes)
                time.sleep(watch.settle_seconds)
                # A run in a process of its own: what it imports and starts ends with it.
                names = ", ".join(change.name for change in changes)
                subprocess.run([sys.executable, "-m", "poemerge", "run", "--reason", f"{names} landed"], check=False)
            time.sleep(watch.interval_seconds)
