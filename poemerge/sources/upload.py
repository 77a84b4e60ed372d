"""A folder to a Hugging Face hub: hf://owner/name."""

from __future__ import annotations

from pathlib import Path

from poemerge.errors import BadInputError, Problem, SourceError
from poemerge.sources.hub import api

__all__ = ["hub_name", "upload"]


def hub_name(address: str) -> str:
    """owner/name of hf://owner/name. Raises BadInputError when it is no such address."""
    name = address.removeprefix("hf://").strip("/")
    parts = name.split("/")
    if not address.startswith("hf://") or len(parts) != 2 or not all(parts):
        raise BadInputError(
            Problem("--out", got=address, expected="hf://owner/name", next_step="name the repository to upload to")
        )
    return name


def upload(folder: Path, address: str, message: str, *, private: bool = True) -> str:
    """Makes `folder` the content of the repository `address` (hf://owner/name), in one commit; the repository is
    created, private unless told otherwise, when it does not exist. Returns the commit's URL.

    Raises SourceError when the hub refuses.
    """
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete
    from huggingface_hub.errors import HfHubHTTPError

    name = hub_name(address)
    client = api()
    try:
        client.create_repo(name, repo_type="model", private=private, exist_ok=True)
        files = {path.relative_to(folder).as_posix(): path for path in sorted(folder.rglob("*")) if path.is_file()}
        there = set(client.list_repo_files(name)) - {".gitattributes"}
        # Not upload_folder, which commits in several parts: a reader in between would see half a model.
        operations = [
            *(CommitOperationAdd(relative, str(path)) for relative, path in files.items()),
            *(CommitOperationDelete(relative) for relative in sorted(there - set(files))),
        ]
        commit = client.create_commit(name, operations, commit_message=message)
    except (HfHubHTTPError, OSError, RuntimeError, ValueError) as error:
        next_step = "set HF_TOKEN to a token that may write there"
        if "xet" in str(error):
            next_step += "; for a hub that stores no files by Xet, set HF_HUB_DISABLE_XET=1"
        raise SourceError(
            f"The hub refused the upload.\n  got:      {' '.join(str(error).split())[:300]}\n"
            f"  expected: the right to write to {name} at {client.endpoint}\n"
            f"  next:     {next_step}"
        ) from error
    return str(commit.commit_url)
