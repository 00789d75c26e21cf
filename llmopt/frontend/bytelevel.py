"""A byte-level tokenizer of any vocabulary size, so that a random checkpoint can be served."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator, Mapping
from typing import Any

CHAT_TEMPLATE = (
    "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)


def tokenizer_files(config: Mapping[str, Any]) -> dict[str, str]:
    """tokenizer.json, tokenizer_config.json and chat_template.jinja for a config; empty when 256 bytes do not fit.

    Every id decodes: 256 ids are the bytes, the config's special ids are ``<|bos|>`` and ``<|eos|>``, the others are
    made-up words. Nothing merges, so a text encodes to its bytes.
    """
    size, specials = int(config["vocab_size"]), special_tokens(config)
    free = [i for i in range(size) if i not in specials]
    if len(free) < 256:
        return {}
    vocabulary = {
        **{text: i for i, text in specials.items()},
        **dict(zip(itertools.chain(bytes_text(), words()), free)),
    }
    added = [
        {"id": i, "content": text, "single_word": False, "lstrip": False, "rstrip": False, "normalized": False,
         "special": True}
        for i, text in sorted(specials.items())
    ]  # fmt: skip
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    tokenizer: dict[str, Any] = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added,
        "normalizer": None,
        "pre_tokenizer": level,
        "post_processor": level,
        "decoder": level,
        "model": {
            "type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None,
            "end_of_word_suffix": None, "fuse_unk": False, "byte_fallback": False, "ignore_merges": False,
            "vocab": dict(sorted(vocabulary.items(), key=lambda item: item[1])), "merges": [],
        },
    }  # fmt: skip
    settings: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
    settings |= {f"{text.strip('<|>')}_token": text for text in specials.values() if text in ("<|bos|>", "<|eos|>")}
    return {
        "tokenizer.json": json.dumps(tokenizer, ensure_ascii=False) + "\n",
        "tokenizer_config.json": json.dumps(settings, indent=2, sort_keys=True) + "\n",
        "chat_template.jinja": CHAT_TEMPLATE,
    }


def special_tokens(config: Mapping[str, Any]) -> dict[int, str]:
    """Special ids of a config inside its vocabulary, with a text each."""
    found: dict[int, str] = {}
    if isinstance(bos := config.get("bos_token_id"), int):
        found[bos] = "<|bos|>"
    eos = config.get("eos_token_id")
    for number, token in enumerate(eos if isinstance(eos, list) else [] if eos is None else [eos]):
        found.setdefault(token, f"<|eos{number or ''}|>")
    return {i: text for i, text in found.items() if 0 <= i < int(config["vocab_size"])}


def bytes_text() -> Iterator[str]:
    """The 256 characters byte-level BPE writes bytes as (GPT-2's table): printable ones as themselves."""
    printable = {*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)}
    shifted = itertools.count(256)
    for byte in range(256):
        yield chr(byte) if byte in printable else chr(next(shifted))


def words() -> Iterator[str]:
    """Words with a space in front, each once: Ġaa, Ġab, …"""
    for length in itertools.count(2):
        for letters in itertools.product("abcdefghijklmnopqrstuvwxyz", repeat=length):
            yield "Ġ" + "".join(letters)
