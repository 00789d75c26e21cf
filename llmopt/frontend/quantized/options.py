"""Keys of ``quantization_config``, read strictly."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from llmopt.errors import CheckpointError, UnsupportedModelError


@dataclass(frozen=True)
class Options:
    """A mapping of the config; ``where`` names the file and the key above it."""

    values: Mapping[str, Any]
    where: str

    def integer(self, *keys: str, default: int | None = None) -> int:
        """The integer under the first key present. Raises CheckpointError when there is none, or another type."""
        value = self.any(*keys, default=default)
        if not isinstance(value, int) or isinstance(value, bool):
            raise CheckpointError(f"{keys[0]} is {value!r}, an integer is needed", where=self.where)
        return value

    def flag(self, key: str, default: bool) -> bool:
        """A boolean. Raises CheckpointError for another type."""
        value = self.any(key, default=default)
        if not isinstance(value, bool):
            raise CheckpointError(f"{key} is {value!r}, true or false is needed", where=self.where)
        return value

    def one_of(self, key: str, known: tuple[Any, ...], default: Any = None) -> Any:
        """A value among ``known``. Raises UnsupportedModelError for others."""
        value = self.any(key, default=default)
        if value not in known:
            self.unsupported(key, value, known)
        return value

    def bits(self, *keys: str, known: tuple[int, ...]) -> int:
        """Bits of a code. Raises UnsupportedModelError for others than ``known``."""
        value = self.integer(*keys)
        if value not in known:
            self.unsupported(keys[0], value, known)
        return value

    def any(self, *keys: str, default: Any = None) -> Any:
        """The value under the first key present and not null."""
        return next((self.values[k] for k in keys if self.values.get(k) is not None), default)

    def below(self, key: str) -> Options | None:
        """The mapping under a key; None when it is absent or null. Raises CheckpointError for another type."""
        value = self.any(key)
        if value is None:
            return None
        if not isinstance(value, Mapping):
            raise CheckpointError(f"{key} is {value!r}, a mapping is needed", where=self.where)
        return Options(value, f"{self.where}, {key}")

    def unsupported(self, key: str, value: Any, known: tuple[Any, ...]) -> None:
        """Raise UnsupportedModelError for a value no reader knows."""
        hint = f"known: {', '.join(map(str, known))}"
        raise UnsupportedModelError(f"{key} {value!r} is not supported", where=self.where, hint=hint)
