"""Make the secrets that compose.yaml names, at random, where they do not exist yet; those that do are left alone.

    python infra/make_secrets.py [FOLDER]     default: infra/secrets, which git ignores

The folder is open to its owner alone; the files in it can be read by all, because a container's user (not root, and not
you) reads them through a mount that the folder's rights do not reach.
"""

from __future__ import annotations

import json
import secrets
import sys
from pathlib import Path

RANDOM = (
    "postgres_password",
    "prefect_db_password",
    "mlflow_db_password",
    "mlflow_admin_password",
    "mlflow_password",
    "mlflow_flask_key",
    "s3_access_key",
    "s3_secret_key",
)


def make_secrets(folder: Path) -> None:
    """Write what is missing in `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    folder.chmod(0o700)
    for name in RANDOM:
        _write(folder / name, secrets.token_urlsafe(24).replace("-", "x"))
    _write(folder / "prefect_auth", f"poemerge:{secrets.token_urlsafe(24)}")
    keys = {
        "accessKey": (folder / "s3_access_key").read_text(encoding="utf-8"),
        "secretKey": (folder / "s3_secret_key").read_text(encoding="utf-8"),
    }
    identity = {"name": "poemerge", "credentials": [keys], "actions": ["Admin", "Read", "Write", "List", "Tagging"]}
    _write(folder / "s3_identities", json.dumps({"identities": [identity]}))


def _write(path: Path, text: str) -> None:
    if not path.exists():
        path.write_text(text, encoding="utf-8")
        path.chmod(0o444)


if __name__ == "__main__":
    make_secrets(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parent / "secrets")
