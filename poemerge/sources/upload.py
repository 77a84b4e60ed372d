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
    """Uploads `folder` as one commit to the repository `address` (hf://owner/name), which is created, private unless
    told otherwise, when it does not exist; returns the commit's URL.

    Raises SourceError when the hub refuses.
    """
    from huggingface_hub.errors import HfHubHTTPError

    name = hub_name(address)
    client = api()
    try:
        client.create_repo(name, repo_type="model", private=private, exist_ok=True)
        commit = client.upload_folder(repo_id=name, folder_path=str(folder), commit_message=message)
    except (HfHubHTTPError, OSError) as error:
        raise SourceError(
            f"The hub refused the upload.\n  got:      {' '.join(str(error).split())[:300]}\n"
            f"  expected: the right to write to {name} at {client.endpoint}\n"
            "  next:     set HF_TOKEN to a token that may write there"
        ) from error
    return str(commit.commit_url)
