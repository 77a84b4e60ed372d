"""`poemerge`: one file a command; this one only finds them, and turns errors into messages and exit statuses."""

from __future__ import annotations

import argparse
import importlib
import os
import pkgutil
import signal
import sys
from collections.abc import Sequence

import poemerge.cli
from poemerge.errors import PoemergeError

__all__ = ["build_parser", "main"]

COMMANDS = (
    "demo",
    "zoo",
    "run",
    "plan",
    "status",
    "ui",
    "merge",
    "evaluate",
    "report",
    "sweep",
    "models",
    "lineage",
    "promote",
    "approve",
    "reject",
    "rollback",
    "replay",
    "export",
    "gc",
    "watch",
    "serve",
    "doctor",
)
"""In the order that somebody meets them."""


def build_parser() -> argparse.ArgumentParser:
    """The parser with every command that lives in poemerge/cli."""
    parser = argparse.ArgumentParser(
        prog="poemerge",
        description="Merge fine-tuned models as MAP inference under a product of experts.",
        epilog="`poemerge COMMAND --help` shows an example of each. Exit status: 0 done, 1 the work failed, "
        "2 bad usage or bad input.",
    )
    parser.add_argument("--version", action=_Version, nargs=0, help="print the version and exit")
    subparsers = parser.add_subparsers(title="commands", dest="command", metavar="COMMAND", required=True)
    present = {module.name for module in pkgutil.iter_modules(poemerge.cli.__path__)}
    for name in COMMANDS:
        if name in present:
            importlib.import_module(f"poemerge.cli.{name}").add_parser(subparsers)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns its exit status: 0 done, 1 work failed, 2 bad usage or bad input, 130 interrupted."""
    args = build_parser().parse_args(argv)
    try:
        status: int = args.run(args)
    except PoemergeError as error:
        print(f"poemerge {args.command}: {error}", file=sys.stderr)
        return error.exit_status
    except KeyboardInterrupt:
        print(f"poemerge {args.command}: interrupted", file=sys.stderr)
        return 128 + signal.SIGINT
    except BrokenPipeError:
        # The reader of our output (head, less) has gone: not an error, and nothing more can be said.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    return status


class _Version(argparse.Action):
    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> None:
        from importlib.metadata import version

        print(f"poemerge {version('poemerge')}")
        parser.exit()


if __name__ == "__main__":
    sys.exit(main())
