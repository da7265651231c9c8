"""Asks the server of this container whether it is ready: exit status 0 if so, else 1 and one line that says why.

Runs in the image, on Python's standard library alone. Two environment variables concern it:

``VLLM_SPECTRAL_READY_URL``: where it asks; name it when ``serve`` is given another ``--port``, or TLS.
``VLLM_API_KEY``: vLLM's own variable for the key; sent along in case the server wants it on every path.
"""

from __future__ import annotations

import json
import os
import sys
import urllib.error
import urllib.request

DEFAULT_URL = "http://127.0.0.1:8000/ready"
SECONDS = 8  # less than the image's HEALTHCHECK allows, so that the line below is what is seen


def main() -> int:
    """0 if the server answers that it is ready."""
    url = os.environ.get("VLLM_SPECTRAL_READY_URL") or DEFAULT_URL
    # A proxy for the outside world has no business with this container's own server.
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        request = urllib.request.Request(url)
        if key := os.environ.get("VLLM_API_KEY"):
            request.add_header("Authorization", f"Bearer {key}")
        with opener.open(request, timeout=SECONDS) as response:
            print(f"ready (HTTP {response.status})")
            return 0
    except urllib.error.HTTPError as error:
        print(f"not ready (HTTP {error.code}): {_reason(error.read())}", file=sys.stderr)
    except (OSError, ValueError) as error:
        print(f"not ready: no answer from {url}: {error}", file=sys.stderr)
    return 1


def _reason(body: bytes) -> str:
    try:
        return str(json.loads(body)["reason"])
    except (ValueError, KeyError, TypeError):
        return "the answer does not say why"


if __name__ == "__main__":
    sys.exit(main())
