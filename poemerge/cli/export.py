"""`poemerge export`: a registered version as a Hugging Face folder."""

from __future__ import annotations

import argparse

__all__ = ["add_parser", "run"]

DESCRIPTION = """\
Writes a registered version as a Hugging Face folder: weights, config, tokenizer, heads, merge.json, lineage.json and a
model card with sources, licences, scores and digest. `transformers.AutoModel.from_pretrained` loads it.

example:
  $ poemerge export champion --out exported
  version 2 (91d0c2a47be1) is in exported
"""


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Adds the command."""
    parser = subparsers.add_parser(
        "export",
        help="write a registered version as a Hugging Face folder",
        description=DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("version", help="a version's number, an alias (champion), or the beginning of a digest")
    parser.add_argument("--out", required=True, help="a new folder, or hf://owner/name")
    parser.add_argument("--public", action="store_true", help="a hub repository that is created is public")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Writes, or uploads."""
    import tempfile
    from pathlib import Path

    from poemerge.project import Project
    from poemerge.registry.export import export
    from poemerge.sources.upload import hub_name, upload

    project = Project.find()
    if not args.out.startswith("hf://"):
        out = Path(args.out).resolve()
        version = export(project, args.version, out)
        print(f"version {version.version} ({version.digest[:12]}) is in {args.out}")
        return 0
    name = hub_name(args.out)
    with tempfile.TemporaryDirectory(prefix="poemerge-") as scratch:
        folder = Path(scratch) / "model"
        version = export(project, args.version, folder, name)
        message = f"{version.model} version {version.version}, digest {version.digest}"
        url = upload(folder, args.out, message, private=not args.public)
    print(f"version {version.version} ({version.digest[:12]}) is at {url}")
    return 0
