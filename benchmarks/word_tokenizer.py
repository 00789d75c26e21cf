"""A stand-in tokenizer with a word for each token, for serving benchmarks of random weights.

    python benchmarks/word_tokenizer.py CHECKPOINT/config.json CHECKPOINT/tokenizer.json

Random logits name every token of the vocabulary, and a server streams no token that has no text: with a small
tokenizer beside a large vocabulary the time between tokens measured at the client is that between texts.
"""

from __future__ import annotations

import argparse
import json
from itertools import count, islice
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers


def word_tokenizer(vocab_size: int) -> Tokenizer:
    """Bytes, then words "w0", "w1", … up to ``vocab_size`` ids; texts are cut into bytes. Raises ValueError for fewer
    ids than there are bytes."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    if vocab_size < len(letters):
        raise ValueError(f"{vocab_size} tokens are fewer than the {len(letters)} bytes")
    words = (f"Ġw{number}" for number in count())
    tokens = [*letters, *islice(words, vocab_size - len(letters))]
    made = Tokenizer(models.BPE({token: id_ for id_, token in enumerate(tokens)}, []))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    return made


def main() -> None:
    """Write the tokenizer of a configuration's vocabulary."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("config", type=Path)
    parser.add_argument("output", type=Path)
    options = parser.parse_args()
    config = json.loads(options.config.read_text("utf-8"))
    word_tokenizer(config["vocab_size"]).save(str(options.output))


if __name__ == "__main__":
    main()
