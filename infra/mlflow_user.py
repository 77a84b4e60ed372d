"""Make the pipeline's MLflow user (no administrator) and Prefect's work pool. Safe to run again."""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from pathlib import Path

import requests

TIMEOUT = 60


def main(pool: str) -> None:
    """Both servers are those that MLFLOW_TRACKING_URI and PREFECT_API_URL name."""
    make_user(os.environ["MLFLOW_TRACKING_USERNAME"], os.environ["MLFLOW_TRACKING_PASSWORD"])
    prefect = Path(sys.executable).with_name("prefect")
    subprocess.run(
        [prefect, "--no-prompt", "work-pool", "create", pool, "--type", "process", "--overwrite"],
        check=True,
        stdin=subprocess.DEVNULL,
    )


def make_user(name: str, password: str) -> None:
    """The MLflow user `name`; its password becomes `password`. It manages what it makes and reads the rest."""
    root = f"{os.environ['MLFLOW_TRACKING_URI']}/api/2.0/mlflow/users"
    admin = ("admin", os.environ["MLFLOW_ADMIN_PASSWORD"])
    user = {"username": name, "password": password}
    found = requests.get(f"{root}/get", params={"username": name}, auth=admin, timeout=TIMEOUT)
    if found.status_code == requests.codes.not_found:
        answer = requests.post(f"{root}/create", json=user, auth=admin, timeout=TIMEOUT)
    else:
        found.raise_for_status()
        answer = requests.patch(f"{root}/update-password", json=user, auth=admin, timeout=TIMEOUT)
    answer.raise_for_status()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pool", required=True)
    main(parser.parse_args().pool)
