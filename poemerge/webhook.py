"""An HTTP endpoint on which a hub, an MLflow registry or a CI says that something landed.

What a request says is not believed: a request that is signed only makes poemerge look at its sources now. So a replayed
or repeated request starts nothing, and there is nothing to inject.
"""

from __future__ import annotations

import base64
import hashlib
import hmac
import json
import logging
import os
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from poemerge.errors import ProjectError

__all__ = ["authentic", "read_secret", "webhook"]

log = logging.getLogger(__name__)

MAX_BODY = 1_000_000
MAX_AGE_SECONDS = 300.0


def read_secret() -> bytes | None:
    """The shared secret: POEMERGE_WEBHOOK_SECRET, or the content of the file POEMERGE_WEBHOOK_SECRET_FILE names.

    None when neither is set. Raises ProjectError when the file cannot be read or the secret is shorter than 16 bytes.
    """
    secret = os.environ.get("POEMERGE_WEBHOOK_SECRET")
    path = os.environ.get("POEMERGE_WEBHOOK_SECRET_FILE")
    if secret is None and path is not None:
        try:
            secret = Path(path).read_text(encoding="utf-8").strip()
        except OSError as error:
            raise ProjectError(
                f"The webhook's secret cannot be read.\n  got:      {error}\n  expected: a file with the secret\n"
                "  next:     mend POEMERGE_WEBHOOK_SECRET_FILE"
            ) from error
    if secret is None:
        return None
    if len(secret) < 16:
        raise ProjectError(
            f"The webhook's secret is too short.\n  got:      {len(secret)} characters\n  expected: at least 16\n"
            "  next:     make one with `openssl rand -hex 32`"
        )
    return secret.encode()


def authentic(headers: Mapping[str, str], body: bytes, secret: bytes, now: float) -> bool:
    """Whether a request was sent by somebody who knows `secret`.

    Three signatures are known: GitHub's (X-Hub-Signature-256: HMAC-SHA256 of the body, which CIs use too), MLflow's
    (X-MLflow-Signature over delivery id, timestamp and body, not older than five minutes at `now`, seconds since 1970),
    and the Hugging Face hub's plain X-Webhook-Secret, which is only as safe as the connection it came by.
    """
    if "X-Hub-Signature-256" in headers:
        expected = "sha256=" + hmac.new(secret, body, hashlib.sha256).hexdigest()
        return hmac.compare_digest(headers["X-Hub-Signature-256"].encode(), expected.encode())
    if "X-MLflow-Signature" in headers:
        delivery, stamp = headers.get("X-MLflow-Delivery-Id", ""), headers.get("X-MLflow-Timestamp", "")
        if not stamp.isdigit() or abs(now - int(stamp)) > MAX_AGE_SECONDS:
            return False
        signed = f"{delivery}.{stamp}.".encode() + body
        expected = "v1," + base64.b64encode(hmac.new(secret, signed, hashlib.sha256).digest()).decode()
        return hmac.compare_digest(headers["X-MLflow-Signature"].encode(), expected.encode())
    return hmac.compare_digest(headers.get("X-Webhook-Secret", "").encode(), secret)


@contextmanager
def webhook(host: str, port: int, secret: bytes, asked: threading.Event) -> Iterator[int]:
    """Serve POST /landed while the block runs; yields the port. A signed request sets `asked`: look at the sources now.

    Answers 202 to a signed request, 401 to any other, 413 to a body above 1 MB, 404 elsewhere.
    """

    class Handler(BaseHTTPRequestHandler):
        timeout = 10  # a sender that says nothing holds a thread no longer

        def do_POST(self) -> None:
            try:
                length = int(self.headers.get("Content-Length", "0"))
            except ValueError:
                length = -1
            if self.path != "/landed":
                self._answer(404, "POST /landed")
            elif not 0 <= length <= MAX_BODY:
                self._answer(413, f"a body of at most {MAX_BODY} bytes, with Content-Length")
            elif not authentic(dict(self.headers), self.rfile.read(length), secret, time.time()):
                self._answer(401, "a signature made with the shared secret")
            else:
                asked.set()
                self._answer(202, None)

        def _answer(self, status: int, expected: str | None) -> None:
            said = {"status": "looking"} if expected is None else {"expected": expected}
            content = json.dumps(said).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(content)))
            self.send_header("Connection", "close")
            self.end_headers()
            self.wfile.write(content)
            self.close_connection = True

        def log_message(self, format: str, *args: object) -> None:  # noqa: A002 - the base class's name
            log.info("webhook: " + format, *args)

    server = ThreadingHTTPServer((host, port), Handler)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, name="webhook", daemon=True).start()
    try:
        yield server.server_address[1]
    finally:
        server.shutdown()
        server.server_close()
