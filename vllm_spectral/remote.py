"""Asking a running server."""

from __future__ import annotations

import urllib.request
from typing import Any


class NoRedirects(urllib.request.HTTPRedirectHandler):
    """For openers that carry an API key: it is for the server that was named, and for no other."""

    def redirect_request(self, *_args: Any, **_kwargs: Any) -> None:
        """None: a redirection is an error."""
        return
