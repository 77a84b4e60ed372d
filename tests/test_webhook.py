"""The webhook's signatures, as the senders' own code makes them, and what it refuses."""

from __future__ import annotations

import hashlib
import hmac
import http.client
import threading
import time
from pathlib import Path

import pytest

from poemerge.errors import ProjectError
from poemerge.webhook import MAX_BODY, authentic, read_secret, webhook

SECRET = b"0123456789abcdef"


def post(port: int, path: str, body: bytes, headers: dict[str, str]) -> int:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
    try:
        connection.request("POST", path, body, headers)
        return connection.getresponse().status
    finally:
        connection.close()


def test_a_signed_request_asks_for_a_look_and_no_other_does() -> None:
    asked = threading.Event()
    signed = {"X-Hub-Signature-256": "sha256=" + hmac.new(SECRET, b"{}", hashlib.sha256).hexdigest()}
    with webhook("127.0.0.1", 0, SECRET, asked) as port:
        assert post(port, "/landed", b"{}", {}) == 401
        assert post(port, "/landed", b"{ }", signed) == 401
        assert post(port, "/landed", b"{}", {"X-Webhook-Secret": "0123456789abcdeF"}) == 401
        assert post(port, "/", b"{}", signed) == 404
        assert post(port, "/landed", b"", {"Content-Length": str(MAX_BODY + 1)}) == 413
        assert not asked.is_set()
        assert post(port, "/landed", b"{}", signed) == 202
        assert asked.is_set()


def test_a_sender_that_says_nothing_does_not_keep_others_out() -> None:
    asked = threading.Event()
    with webhook("127.0.0.1", 0, SECRET, asked) as port:
        silent = http.client.HTTPConnection("127.0.0.1", port)
        silent.connect()
        assert post(port, "/landed", b"{}", {"X-Webhook-Secret": SECRET.decode()}) == 202
        silent.close()


def test_mlflows_own_signature_is_known_and_grows_old() -> None:
    from mlflow.webhooks.delivery import _generate_hmac_signature

    now = time.time()
    stamp = str(int(now))
    body = '{"entity": "model_version"}'
    headers = {
        "X-MLflow-Signature": _generate_hmac_signature(SECRET.decode(), "id-1", stamp, body),
        "X-MLflow-Delivery-Id": "id-1",
        "X-MLflow-Timestamp": stamp,
    }
    assert authentic(headers, body.encode(), SECRET, now)
    assert not authentic(headers, body.encode(), SECRET, now + 301)
    assert not authentic(headers | {"X-MLflow-Timestamp": str(int(now) + 1)}, body.encode(), SECRET, now)
    assert not authentic(headers, b"{}", SECRET, now)


def test_a_secret_comes_from_a_file_and_must_be_long(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("POEMERGE_WEBHOOK_SECRET", raising=False)
    monkeypatch.delenv("POEMERGE_WEBHOOK_SECRET_FILE", raising=False)
    assert read_secret() is None
    file = tmp_path / "secret"
    monkeypatch.setenv("POEMERGE_WEBHOOK_SECRET_FILE", str(file))
    with pytest.raises(ProjectError, match="cannot be read"):
        read_secret()
    file.write_text("0123456789abcdef\n")
    assert read_secret() == SECRET
    file.write_text("short")
    with pytest.raises(ProjectError, match="at least 16"):
        read_secret()
