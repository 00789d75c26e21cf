"""The page at ``/``: a playground and a live view, plain files that ask for nothing outside this server."""

from __future__ import annotations

from importlib.resources import files

from fastapi import FastAPI
from fastapi.responses import Response

from llmopt.serve.errors import ApiError

TYPES = {"html": "text/html", "css": "text/css", "js": "text/javascript", "svg": "image/svg+xml"}
POLICY = "; ".join(
    (
        "default-src 'none'",
        "script-src 'self'",
        "style-src 'self'",
        "img-src 'self'",
        "connect-src 'self'",
        "base-uri 'none'",
        "form-action 'none'",
        "frame-ancestors 'none'",
        "require-trusted-types-for 'script'",
    )
)
"""Nothing from elsewhere, nothing inline, no frame around it, no text that becomes markup."""
HEADERS = {
    "content-security-policy": POLICY,
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cross-origin-opener-policy": "same-origin",
    "cache-control": "no-cache",
}


def add_page(app: FastAPI) -> None:
    """Serve the page; its files are read once and are the only names served."""
    found = {path.name: path for path in files(__package__).iterdir()}
    contents = {n: p.read_bytes() for n, p in found.items() if n.rpartition(".")[2] in TYPES}

    def answer(name: str) -> Response:
        if name not in contents:
            raise ApiError(f"the page has no file {name!r}", status=404)
        kind = TYPES[name.rpartition(".")[2]]
        return Response(contents[name], headers=HEADERS, media_type=f"{kind}; charset=utf-8")

    @app.get("/", include_in_schema=False)
    async def index() -> Response:
        return answer("index.html")

    @app.get("/page/{name}", include_in_schema=False)
    async def file(name: str) -> Response:
        return answer(name)
