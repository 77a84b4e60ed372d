"""Settings that every test shares: quiet libraries, no hub, no spinning threads."""

from __future__ import annotations

import atexit
import os
import shutil
import tempfile

# Before torch, prefect, mlflow and huggingface_hub are imported: they read these once.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("DO_NOT_TRACK", "1")
os.environ.setdefault("PREFECT_SERVER_ANALYTICS_ENABLED", "false")
os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# What merges measure of the tests' models is kept for one run of the tests, by all its workers.
if "POEMERGE_CACHE" not in os.environ:
    os.environ["POEMERGE_CACHE"] = tempfile.mkdtemp(prefix="poemerge-tests-")
    atexit.register(shutil.rmtree, os.environ["POEMERGE_CACHE"], ignore_errors=True)
# A test that reached a real server would pass or fail with the weather.
for name in ("PREFECT_API_URL", "MLFLOW_TRACKING_URI", "MLFLOW_REGISTRY_URI", "HF_ENDPOINT", "HF_TOKEN"):
    os.environ.pop(name, None)

import pytest  # noqa: E402


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests marked gpu need a CUDA device."""
    marked = [item for item in items if item.get_closest_marker("gpu")]
    if marked:
        import torch

        if not torch.cuda.is_available():
            for item in marked:
                item.add_marker(pytest.mark.skip(reason="no CUDA device here"))
