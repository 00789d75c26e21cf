"""API keys: who may ask, and in whose name."""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Mapping
from pathlib import Path

from llmopt.errors import ConfigError
from llmopt.serve.errors import ApiError

VARIABLE = "LLMOPT_API_KEYS"
"""Environment variable with keys, separated by commas."""


class ApiKeys:
    """The keys a server accepts, kept as digests. Without any, everyone may ask."""

    def __init__(self, keys: Mapping[str, str]) -> None:
        """``keys``: tenant by key."""
        self._tenants = {_digest(key): tenant for key, tenant in keys.items()}

    def __len__(self) -> int:
        return len(self._tenants)

    def tenant(self, authorization: str | None) -> str:
        """The tenant of an ``Authorization: Bearer …`` header. Raises ApiError (401) for a missing or unknown key.

        Every key is compared, in constant time, so that the time taken says nothing about them.
        """
        if not self._tenants:
            return ""
        scheme, _, key = (authorization or "").partition(" ")
        digest, found = _digest(key.strip()), None
        for known, tenant in self._tenants.items():
            if hmac.compare_digest(known, digest):
                found = tenant
        if found is None or scheme.lower() != "bearer":
            what = "the API key is missing" if not authorization else "the API key is not valid"
            raise ApiError(what, code="invalid_api_key", status=401, hint="send Authorization: Bearer KEY")
        return found


def load_keys(file: Path | None, environment: Mapping[str, str]) -> ApiKeys:
    """Keys of a file, one a line (``KEY``, or ``TENANT KEY``; ``#`` begins a comment), and of the environment.

    Keys without a tenant's name are a tenant each. Raises ConfigError for a file that cannot be read or holds no key.
    """
    lines = [key for key in environment.get(VARIABLE, "").split(",") if key.strip()]
    if file is not None:
        try:
            text = file.read_text("utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"cannot read the API keys: {error}", where=str(file)) from error
        found = [line for line in (raw.partition("#")[0].strip() for raw in text.splitlines()) if line]
        if not found:
            raise ConfigError("the file holds no API key", where=str(file))
        lines += found
    keys = {}
    for line in lines:
        *tenant, key = line.split()
        if len(tenant) > 1:
            raise ConfigError("expected KEY or TENANT KEY on a line", where=str(file))
        keys[key] = tenant[0] if tenant else f"key-{_digest(key).hex()[:8]}"
    return ApiKeys(keys)


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).digest()
