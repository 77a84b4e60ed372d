"""`poemerge lineage`: what a version was made of, and which versions hold an input."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from typing import Any

__all__ = ["add_parser", "run"]

DESCRIPTION = """\
Prints where a registered version comes from: code, params, base, every expert with its revision and digest, evaluation
data, the selected expert family, gates, and every decision about it. With --recall, the other way round: which versions
hold an expert, given its name, its source, or the beginning of a revision or digest; those that `poemerge gc` removed
too.

examples:
  $ poemerge lineage champion
  $ poemerge lineage 3 --graph > lineage.mmd
  $ poemerge lineage --recall 9dccc5cdce5c
  version  aliases              holds
        3                       b (9dccc5cdce5c)
        1  champion             b (9dccc5cdce5c)
"""


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Adds the command."""
    parser = subparsers.add_parser(
        "lineage",
        help="what a version was made of; which versions hold an expert",
        description=DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("version", nargs="?", help="number, alias or digest (default: champion)")
    parser.add_argument("--recall", metavar="INPUT", help="the versions that hold this expert, revision or digest")
    form = parser.add_mutually_exclusive_group()
    form.add_argument("--json", action="store_true", help="print JSON")
    form.add_argument("--graph", action="store_true", help="print a Mermaid flowchart")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Prints the chain or the recall."""
    from poemerge.project import Project
    from poemerge.registry.lineage import chain, graph
    from poemerge.registry.tracking import connect, speaking, tracking_uri
    from poemerge.registry.versions import find_version

    project = Project.find()
    model = project.load_params().register_.model
    client = connect(project)
    with speaking(tracking_uri(project)):
        if args.recall is not None:
            return _recall(client, model, args.recall, args.json)
        document = chain(client, find_version(client, model, args.version or "champion"))
    if args.json:
        print(json.dumps(document, indent=2, ensure_ascii=False))
    elif args.graph:
        print(graph(document))
    else:
        print("\n".join(_lines(document)))
    return 0


def _recall(client: Any, model: str, wanted: str, as_json: bool) -> int:
    from poemerge.registry.lineage import recall
    from poemerge.registry.versions import list_versions

    found = recall(client, model, wanted)
    there = {version.version for version in list_versions(client, model)}
    if as_json:
        rows = [
            {
                "version": int(version.version),
                "aliases": list(version.aliases),
                "removed": version.version not in there,
                "holds": held,
            }
            for version, held in found
        ]
        print(json.dumps(rows, indent=2))
        return 0
    if not found:
        print(f"no version of {model} holds {wanted}")
        return 0
    print(f"{'version':>7}  {'aliases':<30}  holds")
    for version, held in found:
        inputs = {"base": version.base, **version.experts}
        told = ", ".join(f"{name} ({_short(inputs[name].get('revision') or inputs[name]['digest'])})" for name in held)
        aliases = ", ".join(version.aliases) if version.version in there else "(removed by gc)"
        print(f"{version.version:>7}  {aliases:<30}  {told}")
    return 0


def _lines(document: dict[str, Any]) -> Iterator[str]:
    aliases = f" ({', '.join(document['aliases'])})" if document["aliases"] else ""
    yield f"{document['model']} version {document['version']}{aliases}, digest {document['digest']}"
    git, mean, selected = document["git"], document["mean"], document["selected"]
    if mean:
        yield "  scores    " + ", ".join(f"{name} {value:.4f}" for name, value in mean.items() if value is not None)
    changed = f", changed: {', '.join(git['changed'])}" if git["dirty"] else ""
    yield f"  code      git {git['commit'] or 'none'}{changed}"
    params, lock = _short(document["params_digest"]), _short(document["dvc_lock_digest"])
    yield f"  params    sha256 {params}; dvc.lock sha256 {lock}"
    yield f"  method    {document['method']} on {document['device']} in {document['dtype']}"
    if selected.get("family"):
        yield f"  family    {selected['family']}: {selected.get('reason', '')}"
    yield _input("base", document["base"])
    shares = document["weight_shares"]
    for name, origin in document["experts"].items():
        share = f", {shares[name]:.3f} of the weights" if name in shares else ""
        yield _input(f"expert {name}", origin) + share
    for name, suite in document["suites"].items():
        yield f"  suite {name}: data {_short(suite.get('data_digest'))} from {suite.get('source', 'the suite itself')}"
    for name, facts in document["skipped"].items():
        keeps = f"keeps {facts['keeps']}" if facts["keeps"] else "left out"
        yield f"  skipped {name}, {keeps}: {facts['reason']}"
    for name, text in document["gates"].items():
        yield f"  gate {name}: {text}"
    for line in document["decisions"]:
        reason = f": {line['reason']}" if line["reason"] else ""
        yield f"  {line['at'][:16].replace('T', ' ')} {line['action']} by {line['by']}{reason}"


def _input(name: str, origin: dict[str, Any]) -> str:
    licence = f", licence {origin['license']}" if origin.get("license") else ""
    revision = f" at {origin['revision']}" if origin.get("revision") else ""
    return f"  {name}: {origin['source']}{revision}, digest {_short(origin['digest'])}{licence}"


def _short(text: Any) -> str:
    return str(text)[:12] if text else "none"
