"""`poemerge ui`: the Prefect and MLflow pages of the project, until Ctrl-C."""

from __future__ import annotations

import argparse

__all__ = ["add_parser", "run"]

DESCRIPTION = """\
Serve the project's Prefect and MLflow pages on loopback until Ctrl-C. A `poemerge run` meanwhile shows up on them.

$ poemerge ui
Prefect: http://127.0.0.1:4200
MLflow:  http://127.0.0.1:5000
Ctrl-C ends both.

Where PREFECT_API_URL or MLFLOW_TRACKING_URI name a server, its address is printed instead.
"""


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add `ui` to the command line."""
    parser = subparsers.add_parser(
        "ui",
        help="serve the Prefect and MLflow pages",
        description=DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--prefect-port", type=int, default=None, metavar="PORT", help="default: 4200, or a free one")
    parser.add_argument("--mlflow-port", type=int, default=None, metavar="PORT", help="default: 5000, or a free one")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Start what is not configured, print the addresses, wait for Ctrl-C."""
    import contextlib
    import os
    import threading

    from poemerge.cli.flows import ended_by_sigterm
    from poemerge.project import Project
    from poemerge.registry.tracking import check_own
    from poemerge.servers import mlflow_server, prefect_server, publish, published

    project = Project.find()
    already = published(project)
    configured = os.environ.get("MLFLOW_TRACKING_URI", "")
    if not configured.startswith("http"):
        check_own(project)
    with ended_by_sigterm(), contextlib.ExitStack() as stack:
        own: dict[str, str] = {}
        prefect = os.environ.get("PREFECT_API_URL") or already.get("prefect")
        if prefect is None:
            prefect = own["prefect"] = stack.enter_context(
                prefect_server(project, schedules=False, port=args.prefect_port, usual_port=4200)
            )
        mlflow = configured if configured.startswith("http") else already.get("mlflow")
        if mlflow is None:
            mlflow = own["mlflow"] = stack.enter_context(mlflow_server(project, port=args.mlflow_port, usual_port=5000))
        print(f"Prefect: {prefect.removesuffix('/api')}\nMLflow:  {mlflow}", flush=True)
        if not own:
            return 0
        stack.enter_context(publish(project, already | own))
        print(f"Ctrl-C ends {'both' if len(own) == 2 else 'what was started'}.", flush=True)
        with contextlib.suppress(KeyboardInterrupt):
            threading.Event().wait()
    return 0
