"""Make the pipeline's MLflow user, who is no administrator: it manages what it makes and reads the rest.

The name and password are MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD; safe to run again, also to change the
password.
"""

from __future__ import annotations

import os

import requests

TIMEOUT = 60


def main() -> None:
    """The server is the one that MLFLOW_TRACKING_URI names."""
    root = f"{os.environ['MLFLOW_TRACKING_URI']}/api/2.0/mlflow/users"
    admin = ("admin", os.environ["MLFLOW_ADMIN_PASSWORD"])
    name = os.environ["MLFLOW_TRACKING_USERNAME"]
    user = {"username": name, "password": os.environ["MLFLOW_TRACKING_PASSWORD"]}
    found = requests.get(f"{root}/get", params={"username": name}, auth=admin, timeout=TIMEOUT)
    if found.status_code == requests.codes.not_found:
        answer = requests.post(f"{root}/create", json=user, auth=admin, timeout=TIMEOUT)
    else:
        found.raise_for_status()
        answer = requests.patch(f"{root}/update-password", json=user, auth=admin, timeout=TIMEOUT)
    answer.raise_for_status()


if __name__ == "__main__":
    main()
