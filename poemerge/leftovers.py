"""Flow runs that a killed process left behind as running in the project's own Prefect database."""

from __future__ import annotations

import contextlib
import json
import urllib.request
from typing import Any

__all__ = ["crash_leftovers"]


def crash_leftovers(url: str, *, commands: bool = False, workers: bool = False) -> int:
    """Mark runs that count as running at the Prefect API `url` as Crashed, which frees their slots; returns how many.

    Arguments: `commands`, those that a command ran in its own process; `workers`, those that a worker ran. Only for
    runs of which it is known that nobody is at work on them any more, on a server of our own.
    """
    ended = 0
    # A database that is not tidy is no reason not to merge.
    with contextlib.suppress(OSError, ValueError):
        alive = {"flow_runs": {"state": {"type": {"any_": ["RUNNING", "PENDING", "CANCELLING"]}}}}
        for run in _post(f"{url}/flow_runs/filter", alive):
            if workers if run.get("work_queue_id") else commands:
                state = {"type": "CRASHED", "name": "Crashed", "message": "Its process was killed"}
                _post(f"{url}/flow_runs/{run['id']}/set_state", {"state": state, "force": True})
                ended += 1
    return ended


def _post(url: str, content: dict[str, Any]) -> Any:
    body = json.dumps(content).encode()
    request = urllib.request.Request(url, body, {"Content-Type": "application/json"})  # noqa: S310 - our own server
    with urllib.request.urlopen(request, timeout=60) as response:  # noqa: S310
        return json.loads(response.read() or b"null")
