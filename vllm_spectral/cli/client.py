"""A server that is asked for its figures, as a command does: every failure names its cause and the way out."""

from __future__ import annotations

import http.client
import json
import urllib.error
import urllib.request
from typing import Any
from urllib.parse import urlsplit

from vllm_spectral.errors import ConfigError
from vllm_spectral.remote import NoRedirects

KEY_VARIABLE = "VLLM_API_KEY"
TIMEOUT = 10.0
"""Seconds until an answer counts as missing."""


class UnreachableError(ConfigError):
    """The server does not answer, or not at the moment: worth another try.

    Attributes:
        cause: the message without the advice.
    """

    def __init__(self, cause: str, advice: str) -> None:
        super().__init__(f"{cause}: {advice}")
        self.cause = cause


def address(url: str) -> str:
    """The server's address without a final slash; the scheme may be left out, and an OpenAI client's ``/v1`` may stay."""
    full = url if "://" in url else f"http://{url}"
    try:
        parts = urlsplit(full)
        named = parts.scheme in ("http", "https") and bool(parts.hostname) and (parts.port or 1) > 0
    except ValueError:
        named = False
    if not named or parts.query or parts.fragment:
        raise ConfigError(f"{url} is not the address of a server: it looks like http://localhost:8000")
    return full.rstrip("/").removesuffix("/v1").removesuffix("/dashboard").rstrip("/")


class Server:
    """A server that is asked for its figures."""

    def __init__(self, url: str, key: str | None = None) -> None:
        if key is not None and not (key.isascii() and key.isprintable()):
            raise ConfigError("the API key holds characters that no key can have: only printable ASCII")
        self.url = url
        self.key = key
        self._opener = urllib.request.build_opener(NoRedirects)

    def bodies(self) -> dict[str, Any]:
        """What a frame shows, by the last part of the path.

        Raises:
            ConfigError: if the server refuses, or is none of ours.
            UnreachableError: if it does not answer.
        """
        answers = {"memory": self.get("v1/kv_cache/memory"), "ready": self.get("ready")}
        answers |= {name: self.get(f"v1/kv_cache/{name}") for name in ("fidelity", "traffic")}
        return answers

    def profile(self) -> dict[str, Any] | None:
        """The active profile, or None where the stock cache is served."""
        profile: dict[str, Any] | None = self.get("v1/kv_cache/profile", may_be_absent=True)
        return profile

    def get(self, path: str, *, may_be_absent: bool = False) -> Any:
        """The parsed body of a GET; None if the route may be absent and is."""
        request = urllib.request.Request(f"{self.url}/{path}")
        if self.key is not None:
            request.add_header("Authorization", f"Bearer {self.key}")
        try:
            with self._opener.open(request, timeout=TIMEOUT) as response:
                content = response.read()
        except urllib.error.HTTPError as error:
            with error:
                if error.code == 404 and may_be_absent:
                    return None
                if error.code != 503 or path != "ready":
                    raise self._refusal(error.code, path) from None
                content = error.read()
        except (OSError, http.client.HTTPException) as error:
            reason = getattr(error, "reason", None) or error
            cause = getattr(reason, "strerror", None) or str(reason) or type(reason).__name__
            raise UnreachableError(
                f"no answer from {self.url} ({cause})", "is `vllm-spectral serve` running there, on that port?"
            ) from None
        try:
            body = json.loads(content)
        except ValueError:
            body = None
        if not isinstance(body, dict):
            raise self._foreign(path)
        return body

    def _refusal(self, status: int, path: str) -> ConfigError:
        if status == 401:
            if self.key is None:
                return ConfigError(f"{self.url} asks for an API key: give it by --api-key, or set {KEY_VARIABLE}")
            return ConfigError(f"{self.url} does not accept the API key that --api-key or {KEY_VARIABLE} gives")
        if status >= 500:
            return UnreachableError(f"{self.url} answers {status} for /{path}", "its log, or a proxy's, says why")
        if status == 404:
            return self._foreign(path)
        return ConfigError(f"{self.url} answers {status} for /{path}: is this the server's own address?")

    def _foreign(self, path: str) -> ConfigError:
        return ConfigError(
            f"{self.url} is not a vllm-spectral server of this version: it has no figures at /{path} "
            "(stock vLLM has none; behind a proxy, its prefix belongs to the URL)"
        )
