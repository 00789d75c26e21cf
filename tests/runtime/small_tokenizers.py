"""Small tokenizers of each kind, made here."""

from __future__ import annotations

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers

from llmopt.runtime.tokenizer import Tokenizer as Ours


def byte_fallback(strip: bool = True) -> Tokenizer:
    """As Llama 2 and Mistral (``strip``) or Gemma: sentencepiece words, unknown characters as byte tokens."""
    words = ["▁", "a", "b", "c", "e", "é", "▁a", "▁b", "ab", "▁ab", "▁the", "t", "h", "▁t", "th"]
    vocab = {"<unk>": 0, "<s>": 1, "</s>": 2}
    vocab |= {f"<0x{byte:02X}>": 3 + byte for byte in range(256)}
    vocab |= {word: 259 + i for i, word in enumerate(words)}
    merges = [("▁", "a"), ("▁", "b"), ("a", "b"), ("▁a", "b"), ("t", "h")]
    tokenizer = Tokenizer(models.BPE(vocab, merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence([*steps, decoders.Strip(" ", 1, 0)] if strip else steps)
    tokenizer.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in ("<unk>", "<s>", "</s>")])
    return tokenizer


def metaspace() -> Tokenizer:
    """As XLNet or T5: words only, no bytes."""
    pieces = [
        ("<unk>", 0.0),
        ("</s>", 0.0),
        ("▁", -3.0),
        ("▁the", -2.0),
        ("a", -4.0),
        ("b", -4.0),
        ("▁a", -3.0),
        ("é", -5.0),
    ]
    tokenizer = Tokenizer(models.Unigram(pieces, unk_id=0))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    tokenizer.add_special_tokens([AddedToken("</s>", special=True)])
    return tokenizer


def byte_level() -> Tokenizer:
    """As GPT-2: all 256 bytes, a few merges, an added token with a space."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {c: i for i, c in enumerate(alphabet)} | {"Ġa": 256, "Ã©": 257}
    tokenizer = Tokenizer(models.BPE(vocab, [("Ġ", "a"), ("Ã", "©")]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_tokens(["<fim prefix>"])
    tokenizer.add_special_tokens([AddedToken("<|end|>", special=True)])
    return tokenizer


def ours(backend: Tokenizer, **config: object) -> Ours:
    """The wrapper under test."""
    return Ours(backend, config)
