"""The model registry: registered versions, gates, promotion, lineage, replay. MLflow is imported here (and in
sources).
"""

from __future__ import annotations

import os

# Read once, when mlflow is imported: it sends nothing about its use, and answers soon when its server is down.
os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
os.environ.setdefault("DO_NOT_TRACK", "1")
os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")
os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "3")
