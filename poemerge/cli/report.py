"""`poemerge report`: the page of what was merged, written anew from what lies in the project."""

from __future__ import annotations

import argparse

__all__ = ["add_parser", "run"]

DESCRIPTION = """\
Write .poemerge/report/index.html from what the stages left in the project, and say where it is.

The page needs nothing but a browser: no server, no network. `poemerge run` writes one too, which DVC keeps with the
merge: artifacts/report/index.html.

Example:
  $ poemerge report
  Report: /work/main/.poemerge/report/index.html
"""


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the command `report`."""
    parser = subparsers.add_parser(
        "report",
        help="write the report page, and open it",
        description=DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--open", action="store_true", help="open it in the browser")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Write the page; with --open show it."""
    from poemerge.project import Project
    from poemerge.report.write import write_report

    project = Project.find()
    # Not where the stage `register` writes it: DVC would take its output for changed, and the stage for stale.
    path = write_report(project, project.load_params(), project.state / "report" / "index.html")
    print(f"Report: {path}")
    if args.open:
        import webbrowser

        if not webbrowser.open(path.as_uri()):
            print("No browser could be opened here: open that file by hand.")
    return 0
