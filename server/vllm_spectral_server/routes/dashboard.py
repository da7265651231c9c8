"""``GET /dashboard``: a page that draws the figures of the other routes.

The page itself holds no figures and needs no key: it asks for the key where the server has one. It loads nothing from
elsewhere, and the browser is told to hold it to that.
"""

from __future__ import annotations

from importlib.resources import files

from fastapi import APIRouter, HTTPException, Response

ASSETS = {"dashboard.css": "text/css; charset=utf-8", "dashboard.js": "text/javascript; charset=utf-8"}
HEADERS = {
    "Cache-Control": "no-cache",
    # data: is the page's icon.
    "Content-Security-Policy": (
        "default-src 'self'; img-src 'self' data:; base-uri 'none'; form-action 'none'; frame-ancestors 'self'"
    ),
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
}

router = APIRouter(include_in_schema=False)


def _file(name: str, media_type: str) -> Response:
    content = files("vllm_spectral_server").joinpath("static", name).read_bytes()
    return Response(content, media_type=media_type, headers=HEADERS)


@router.get("/dashboard")
def page() -> Response:
    """The page."""
    return _file("index.html", "text/html; charset=utf-8")


@router.get("/dashboard/")
def folder() -> Response:
    """The page's address without the slash, against which its own addresses are relative.

    The redirection is relative as well, because a proxy's prefix is not known here.
    """
    return Response(status_code=308, headers=HEADERS | {"Location": "../dashboard"})


@router.get("/dashboard/{asset}")
def asset(asset: str) -> Response:
    """A file that the page loads."""
    if asset not in ASSETS:
        raise HTTPException(404)
    return _file(asset, ASSETS[asset])
