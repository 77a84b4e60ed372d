"""Exit 0 when the URL given answers with a success, else 1: the health check of services that speak HTTP."""

import sys
import urllib.request

try:
    with urllib.request.urlopen(sys.argv[1], timeout=5):  # noqa: S310 - our own service
        pass
except OSError as error:
    sys.exit(f"{sys.argv[1]}: {error}")
