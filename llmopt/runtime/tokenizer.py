"""The artifact's tokenizer: text to ids as Hugging Face does it, ids to text as a stream."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tokenizers import AddedToken
from tokenizers import Tokenizer as Backend

from llmopt.errors import ArtifactError, RequestError
from llmopt.runtime.detokenize import ByteLevelStream, ByteTable, TextStream, WindowStream, decoder_kind

NAMED = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")


class Tokenizer:
    """Wraps a tokenizer.json and its tokenizer_config.json.

    As in transformers, the post-processor of tokenizer.json alone decides which special tokens ``encode`` adds
    (``add_bos_token`` of the config does not), and the config's named tokens count as special. Text is never
    "cleaned up" after decoding: what the tokens say is what comes out.
    """

    def __init__(self, backend: Backend, config: Mapping[str, Any]) -> None:
        self.backend, self.config = backend, dict(config)
        backend.no_truncation()
        backend.no_padding()
        self.special_tokens = special_tokens(config)
        known = [t for t in self._listed_special() if backend.token_to_id(t) is not None]
        backend.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in known])
        added = backend.get_added_tokens_decoder()
        self.special_ids = frozenset(i for i, token in added.items() if token.special)
        self._kind = decoder_kind(backend)
        self._bytes = ByteTable(backend, self._kind)

    @staticmethod
    def load(tokenizer_json: Path, config_json: Path | None = None) -> Tokenizer:
        """Read the two files; raises ArtifactError when one cannot be used."""
        try:
            backend = Backend.from_file(str(tokenizer_json))
        except Exception as error:  # the library raises bare Exception
            raise ArtifactError(f"not a tokenizer: {error}", where=tokenizer_json.name) from error
        return Tokenizer(backend, read_json(config_json) if config_json else {})

    @property
    def vocab_size(self) -> int:
        """Ids the tokenizer knows, added tokens included (a model's vocabulary may be larger)."""
        return int(self.backend.get_vocab_size(with_added_tokens=True))

    def encode(self, text: str, special: bool = True) -> list[int]:
        """Token ids of a text, with the post-processor's special tokens unless ``special`` is False.

        Raises RequestError when the text is not valid Unicode (a lone surrogate).
        """
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise RequestError(f"the text is not valid Unicode at character {error.start}") from error
        # One text as a batch without offsets: half the time of ``encode``, which can also keep other threads out (12 s
        # for 10 MB were seen).
        [found] = self.backend.encode_batch_fast([text], add_special_tokens=special)
        return list(found.ids)

    def decode(self, ids: Sequence[int], skip_special: bool = True) -> str:
        """Text of a whole sequence, exactly as ``stream`` gives it piece by piece."""
        stream = self.stream(skip_special)
        return "".join([stream.push(i) for i in ids]) + stream.flush()

    def stream(self, skip_special: bool = True, keep: frozenset[int] = frozenset()) -> TextStream:
        """A decoder for one sequence, fed token by token. ``keep``: special tokens that are text all the same."""
        skipped = self.special_ids - keep if skip_special else frozenset()
        if self._kind == "byte_level":
            return ByteLevelStream(self._bytes, skipped)
        return WindowStream(self.backend, self._bytes, skipped)

    def token_bytes(self, token: int) -> bytes:
        """Bytes one token stands for (special tokens: their own text); empty for an unknown id."""
        known = self._bytes.get(token)
        if known is not None:
            return known
        return str(self.backend.decode([token], skip_special_tokens=False)).encode()

    def token_id(self, text: str) -> int | None:
        """Id of a token by its text."""
        found = self.backend.token_to_id(text)
        return None if found is None else int(found)

    def added_id(self, text: str) -> int | None:
        """Id of a token that was added to the vocabulary, special or not, by its text."""
        found = self.token_id(text)
        return found if found in self.backend.get_added_tokens_decoder() else None

    def _listed_special(self) -> list[str]:
        extra = self.config.get("additional_special_tokens") or self.config.get("extra_special_tokens") or []
        return [*self.special_tokens.values(), *(token_text(t) for t in extra if not isinstance(extra, dict))]


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file; raises ArtifactError when it is none."""
    try:
        value = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise ArtifactError(f"not readable as JSON: {error}", where=path.name) from error
    if not isinstance(value, dict):
        raise ArtifactError("expected a JSON object", where=path.name)
    return value


def token_text(token: Any) -> str:
    """A special token's text: configs write it as a string or as ``{"content": …}``."""
    return str(token.get("content", "")) if isinstance(token, Mapping) else str(token)


def special_tokens(config: Mapping[str, Any]) -> dict[str, str]:
    """The config's named special tokens, for chat templates."""
    return {name: token_text(config[name]) for name in NAMED if config.get(name)}
