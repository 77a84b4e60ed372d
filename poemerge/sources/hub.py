"""hf://owner/name[/sub/folder][@revision] and hf://datasets/owner/name…: a repository of a Hugging Face hub.

A branch or tag is resolved to a commit before anything is downloaded, and every file is checked against the digest
that the hub lists for it. A hub that does not answer is an error: the client's own fall-back, the `main` that its cache
last saw, is never used. HF_ENDPOINT, HF_HUB_OFFLINE, HF_HUB_CACHE and HF_TOKEN are read at each call.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path, PurePosixPath
from typing import Any, NoReturn

from poemerge.sources.contents import Kind, needed, require_weights
from poemerge.sources.digests import copy_hashed
from poemerge.sources.folder import files_below
from poemerge.sources.refusal import Refusal, refusing
from poemerge.sources.source import Brought, Revision, Workplace

__all__ = ["HubSource", "api", "speaking_to_hub"]

SHA = re.compile(r"[0-9a-f]{40}")
TIMEOUT = 10.0
"""Seconds for one answer of the hub's interface (downloads have HF_HUB_DOWNLOAD_TIMEOUT, for each block)."""


def api() -> Any:
    """The hub's client at the endpoint that HF_ENDPOINT names now."""
    from huggingface_hub import HfApi, constants

    return HfApi(endpoint=os.environ.get("HF_ENDPOINT") or constants._HF_DEFAULT_ENDPOINT, library_name="poemerge")


def offline() -> bool:
    """Whether HF_HUB_OFFLINE forbids asking the hub."""
    return os.environ.get("HF_HUB_OFFLINE", "").strip().upper() in {"1", "ON", "YES", "TRUE"}


def cache() -> Path:
    """The client's cache, which other projects on this machine share."""
    from huggingface_hub import constants

    return Path(os.environ.get("HF_HUB_CACHE") or constants.HF_HUB_CACHE)


speaking_to_hub = refusing(lambda error: _refuse(error))
"""Turn the client's exceptions of many kinds into Refusals that say whether trying again may help."""


@dataclass(frozen=True)
class HubSource:
    """A model or dataset repository, or a folder in it; `revision` is a branch, tag or commit."""

    repo_id: str
    repo_type: str = "model"
    folder: str = ""
    revision: str = "main"
    remote = True

    @speaking_to_hub
    def resolve(self, place: Workplace, kind: Kind) -> Revision:  # noqa: ARG002 - the hub needs no workplace
        """The commit that `revision` names now; a full commit is taken as it is, without a request."""
        if SHA.fullmatch(self.revision):
            return Revision(self.revision)
        if offline():
            raise Refusal(
                f"HF_HUB_OFFLINE is set, and what {self.revision!r} of {self.repo_id} names today only the hub knows",
                "a commit (40 hex digits) as revision, or the hub",
                "unset HF_HUB_OFFLINE, or pin the revision",
            )
        client = api()
        ask = client.model_info if self.repo_type == "model" else client.dataset_info
        info = ask(self.repo_id, revision=self.revision, timeout=TIMEOUT)
        if not info.sha or not SHA.fullmatch(info.sha):
            raise Refusal(
                f"a commit {info.sha!r}", "a commit of 40 hex digits", "check that HF_ENDPOINT is a hub", transient=True
            )
        if kind == "checkpoint" and info.siblings is not None:
            require_weights(self._relative(sibling.rfilename for sibling in info.siblings))
        return Revision(str(info.sha))

    @speaking_to_hub
    def bring(self, place: Workplace, kind: Kind, revision: str, into: Path) -> Brought:  # noqa: ARG002
        """Download the needed files of the commit `revision` through the client's cache, then copy them."""
        from huggingface_hub import hf_hub_download

        if offline():
            return self._bring_from_cache(kind, revision, into)
        client = api()
        listed = {
            relative: file
            for file in client.list_repo_tree(self.repo_id, recursive=True, revision=revision, repo_type=self.repo_type)
            if hasattr(file, "blob_id")
            for relative in self._relative([file.path])
        }
        if kind == "checkpoint":
            require_weights(listed)
        digests = {}
        for name in self._wanted(listed, kind):
            file = listed[name]
            cached = Path(
                hf_hub_download(
                    self.repo_id,
                    file.path,
                    repo_type=self.repo_type,
                    revision=revision,
                    cache_dir=cache(),
                    endpoint=client.endpoint,
                    etag_timeout=TIMEOUT,
                )
            )
            expected = file.lfs.sha256 if file.lfs else file.blob_id
            digests[name] = _copy_checked(cached, into / name, expected, file.size)
        ask = client.model_info if self.repo_type == "model" else client.dataset_info
        changed: datetime | None = ask(self.repo_id, revision=revision, timeout=TIMEOUT).last_modified
        return Brought(digests, changed.isoformat(timespec="seconds") if changed else None)

    def _bring_from_cache(self, kind: Kind, revision: str, into: Path) -> Brought:
        """Offline: the commit `revision` as the client's cache holds it; blobs there are named by their digest."""
        from huggingface_hub.file_download import repo_folder_name

        repo = cache() / repo_folder_name(repo_id=self.repo_id, repo_type=self.repo_type)
        snapshot = repo / "snapshots" / revision
        names = {
            relative: name
            for name in (files_below(snapshot) if snapshot.is_dir() else ())
            for relative in self._relative([name])
        }
        if not names:
            raise Refusal(
                f"HF_HUB_OFFLINE is set and {self.repo_id} at {revision[:12]} is not in {cache()}",
                "the commit in the client's cache, or the hub",
                "unset HF_HUB_OFFLINE, or fill the cache while online",
            )
        if kind == "checkpoint":
            require_weights(names)
        digests = {}
        for name in self._wanted(names, kind):
            blob = (snapshot / names[name]).resolve()
            digests[name] = _copy_checked(blob, into / name, blob.name, blob.stat().st_size)
        return Brought(digests, None)

    def _relative(self, paths: Any) -> Iterator[str]:
        """The paths inside `folder`, relative to it."""
        for path in paths:
            if not self.folder:
                yield path
            elif path.startswith(self.folder + "/"):
                yield path[len(self.folder) + 1 :]

    def _wanted(self, names: Any, kind: Kind) -> list[str]:
        wanted = needed(names, kind)
        if not wanted:
            raise Refusal(
                f"nothing to take in {self.repo_id}{f'/{self.folder}' if self.folder else ''}",
                "data files",
                "check the address",
            )
        for name in wanted:
            if PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts:
                raise Refusal(f"a file named {name!r}", "names inside the repository", "do not use this repository")
        return wanted


def _copy_checked(cached: Path, target: Path, expected: str, size: int) -> str:
    """Copy a file of the cache; `expected` is its SHA-256, or the SHA-1 of its git blob. Returns its SHA-256.

    What does not match is taken out of the cache, so that the next attempt downloads it anew.
    """
    with cached.open("rb") as file:
        sha256 = copy_hashed(file, target)
    found = sha256 if len(expected) == 64 else _git_blob(target)
    if found != expected:
        blob = cached.resolve()
        cached.unlink(missing_ok=True)
        blob.unlink(missing_ok=True)
        target.unlink()
        raise Refusal(
            f"{target.name} with digest {found[:12]}… ({cached.name}, {size} bytes expected)",
            f"digest {expected[:12]}…, as the hub lists it",
            "if it stays, the hub's storage or a proxy between changes the file",
            transient=True,
        )
    return sha256


def _git_blob(path: Path) -> str:
    content = path.read_bytes()  # git blobs are small files; large ones are LFS
    return hashlib.sha1(b"blob %d\0" % len(content) + content, usedforsecurity=False).hexdigest()


def _refuse(error: Exception) -> NoReturn:
    """Raise `error` as a Refusal where it is the hub's or the network's doing, else as it is."""
    from huggingface_hub import errors

    cause = error.__cause__ if isinstance(error, errors.LocalEntryNotFoundError) and error.__cause__ else error
    first_line = next((line for line in str(cause).splitlines() if line.strip()), type(cause).__name__)
    endpoint = os.environ.get("HF_ENDPOINT") or "the hub"
    if isinstance(cause, errors.GatedRepoError):
        raise Refusal(
            "a gated repository",
            "access to it",
            "accept its terms on the hub, then set HF_TOKEN",
        ) from error
    if isinstance(cause, errors.RevisionNotFoundError):
        raise Refusal("no such revision", "a branch, tag or commit of the repository", "check @revision") from error
    if isinstance(cause, errors.RepositoryNotFoundError):
        raise Refusal(
            f"{endpoint} has no such repository (or hides it)",
            "a repository that this token may read",
            "check owner/name; set HF_TOKEN when it is private",
        ) from error
    if isinstance(cause, errors.HfHubHTTPError):
        status = cause.response.status_code
        wait = cause.response.headers.get("Retry-After", "")
        raise Refusal(
            f"{endpoint} answered {status}",
            "an answer of the hub",
            "try again later; the revision that the cache last saw is not taken in its place",
            transient=status in {408, 425, 429} or status >= 500,
            wait=float(wait) if wait.isdigit() else None,
        ) from error
    if isinstance(cause, errors.HFValidationError):
        raise Refusal(first_line, "hf://owner/name[@revision]", "mend the address") from error
    if isinstance(cause, OSError) or type(cause).__module__.startswith(("httpx", "requests", "urllib3")):
        raise Refusal(
            f"{endpoint} cannot be reached or broke off: {type(cause).__name__}: {first_line[:200]}",
            "an answer of the hub",
            "check the network and HF_ENDPOINT; the revision that the cache last saw is not taken in its place",
            transient=True,
        ) from error
    raise error
