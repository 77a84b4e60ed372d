"""What params.yaml asks for: one by one, and the members that its collections have now."""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlsplit

from poemerge.params import CollectionParams, ExpertParams, Params, SourceParams, SuiteParams
from poemerge.sources.address import is_remote
from poemerge.sources.contents import Kind
from poemerge.sources.hub import api, speaking_to_hub
from poemerge.sources.refusal import Refusal
from poemerge.sources.registered import client, speaking_to_mlflow
from poemerge.sources.source import Workplace
from poemerge.sources.store import folders_in

__all__ = ["Wanted", "members", "named"]

HUB_QUERY = re.compile(r"hf://(?P<owner>[\w.-]+)?(?:\?(?P<query>.+))?")
PATTERN = re.compile(r"models:/(?P<pattern>[^/@]+)(?:@(?P<alias>[^/@]+))?")


@dataclass(frozen=True)
class Wanted:
    """One source: what it is to be (base, expert, suite), its name, and the key of params.yaml it stands under.

    `drop` marks a member of a drop folder, which may be half-copied at any time.
    """

    what: str
    name: str
    where: str
    kind: Kind
    source: str
    revision: str | None = None
    license: str | None = None
    collection: str | None = None
    drop: bool = False

    @property
    def expert(self) -> str | None:
        """The expert's name, for messages; None for the base and suites."""
        return self.name if self.what == "expert" else None


def named(
    base: SourceParams | None, experts: Mapping[str, ExpertParams], suites: Mapping[str, SuiteParams]
) -> Iterator[Wanted]:
    """The sources that stand in params.yaml one by one."""
    if base is not None:
        yield Wanted("base", "base", "params.yaml base.source", "checkpoint", base.source, base.revision)
    for name, expert in experts.items():
        where = f"params.yaml experts.{name}.source"
        yield Wanted("expert", name, where, "checkpoint", expert.source, expert.revision, expert.license)
    for name, suite in suites.items():
        if suite.data is not None:
            yield Wanted("suite", name, f"params.yaml evaluate.suites.{name}.data", "data", suite.data)


def members(name: str, collection: CollectionParams, params: Params, place: Workplace) -> list[Wanted]:
    """The experts that the collection `name` holds now, whole or not, in order of name.

    Never the base, never the model that this project registers (it would merge its own output), and none that stands
    under `experts` already. Raises Refusal when the collection cannot be listed.
    """
    known = {_spot(one.source, place) for one in (params.base, *params.experts.values())}
    found = []
    for member, source in _listed(collection.source, params, place):
        expert = re.sub(r"[^A-Za-z0-9._-]", "-", member).lstrip("._-")[:100]
        if not expert or _spot(source, place) in known:
            continue
        if not _matches(member, collection.include) or _matches(member, collection.exclude):
            continue
        where = f"params.yaml collections.{name}.source, member {member}"
        found.append(Wanted("expert", expert, where, "checkpoint", source, collection=name, drop=not is_remote(source)))
    return sorted(found, key=lambda one: one.name)


def _spot(source: str, place: Workplace) -> str:
    """Where a source lies, however it is spelt and whatever its revision."""
    if is_remote(source):
        return source.split("@")[0].rstrip("/")
    folder = unquote(urlsplit(source).path) if source.startswith("file://") else source
    return str((place.root / Path(folder).expanduser()).resolve())


def _listed(source: str, params: Params, place: Workplace) -> list[tuple[str, str]]:
    if source.startswith("hf://"):
        return _on_hub(source)
    if source.startswith("models:"):
        return _registered(source, params.register_.model, place)
    if "://" in source:
        root = source.removesuffix("*").rstrip("/")
        return [(folder, f"{root}/{folder}") for folder in folders_in(root)]
    return _dropped(source, place)


def _dropped(source: str, place: Workplace) -> list[tuple[str, str]]:
    root = source.removesuffix("*").rstrip("/") or "/"
    folder = place.root / root
    if not folder.is_dir():
        raise Refusal(f"no folder {folder}", "a folder, in which each sub-folder is an expert", "make it")
    return [(p.name, f"{root}/{p.name}") for p in folder.iterdir() if p.is_dir() and not p.name.startswith(".")]


@speaking_to_hub
def _on_hub(source: str) -> list[tuple[str, str]]:
    match = HUB_QUERY.fullmatch(source)
    query = parse_qs(match["query"] or "", keep_blank_values=True) if match else {}
    if match is None or not (match["owner"] or query) or set(query) - {"tag", "search"}:
        raise Refusal(source, "hf://owner, hf://owner?tag=TAG or hf://?search=WORDS&tag=TAG", "mend the address")
    found = api().list_models(
        author=match["owner"], filter=query.get("tag"), search=" ".join(query.get("search", [])) or None
    )
    return [(model.id.rsplit("/", 1)[-1], f"hf://{model.id}") for model in found]


@speaking_to_mlflow
def _registered(source: str, own: str, place: Workplace) -> list[tuple[str, str]]:
    match = PATTERN.fullmatch(source)
    if match is None:
        raise Refusal(source, "models:/PATTERN* or models:/PATTERN*@alias", "mend the address")
    registry = client(place)
    found, token = [], None
    while token is None or token:
        page = registry.search_registered_models(page_token=token)
        token = page.token or ""
        found += [model for model in page if fnmatch.fnmatchcase(model.name, match["pattern"]) and model.name != own]
    listed = []
    for model in found:
        if match["alias"] is not None:
            if match["alias"] in model.aliases:
                listed.append((model.name, f"models:/{model.name}@{match['alias']}"))
            continue
        versions = registry.search_model_versions(f"name = '{model.name}'")
        if versions:
            newest = max(int(version.version) for version in versions)
            listed.append((model.name, f"models:/{model.name}/{newest}"))
    return listed


def _matches(name: str, patterns: tuple[str, ...]) -> bool:
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)
