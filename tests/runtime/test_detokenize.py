"""Streaming detokenization against decoding the whole: same text, no half characters."""

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from llmopt.runtime.detokenize import WindowStream
from tests.runtime.small_tokenizers import byte_fallback, byte_level, metaspace, ours

TOKENIZERS = {
    "byte_level": ours(byte_level()),
    "llama": ours(byte_fallback(strip=True)),
    "gemma": ours(byte_fallback(strip=False)),
    "metaspace": ours(metaspace()),
}
TEXT = st.text(st.sampled_from("ab éthe€😀👩‍🚀日本\n "), max_size=20)


def pieces(tokenizer, ids, skip_special=True):
    """What a stream says to each token, the flush last."""
    stream = tokenizer.stream(skip_special)
    return [*(stream.push(i) for i in ids), stream.flush()]


@pytest.mark.parametrize("name", TOKENIZERS)
@settings(max_examples=200, deadline=None)
@given(text=TEXT)
def test_pieces_of_a_text_add_up_and_are_whole_characters(name, text):
    tokenizer = TOKENIZERS[name]
    ids = tokenizer.encode(text)
    said = pieces(tokenizer, ids)
    assert "".join(said) == tokenizer.backend.decode(ids)
    assert not any("\ufffd" in piece for piece in said)
    assert said[-1] == ""


@settings(max_examples=500, deadline=None)
@given(ids=st.lists(st.integers(0, 262), max_size=24))
def test_any_byte_level_ids_equal_the_whole(ids):
    tokenizer = TOKENIZERS["byte_level"]
    assert "".join(pieces(tokenizer, ids)) == tokenizer.backend.decode(ids)
    assert "".join(pieces(tokenizer, ids, False)) == tokenizer.backend.decode(ids, skip_special_tokens=False)


@pytest.mark.parametrize("name", ["llama", "gemma"])
@settings(max_examples=500, deadline=None)
@example(ids=[3 + 0x20])
@example(ids=[3 + 0x20, 3 + 0x20, 265])
@given(ids=st.lists(st.one_of(st.integers(0, 273), st.integers(3 + 0x7F, 258)), max_size=24))
def test_any_byte_fallback_ids_equal_their_bytes(name, ids):
    tokenizer = TOKENIZERS[name]
    said = "".join(pieces(tokenizer, ids))
    words, kept = [], [i for i in ids if i > 2]
    for i in kept:
        words.append(bytes([i - 3]) if i < 259 else tokenizer.backend.id_to_token(i).replace("▁", " ").encode())
    expected = whole(words, [i < 259 for i in kept])
    assert said == (expected.removeprefix(" ") if name == "llama" else expected)


def whole(words, are_bytes):
    """Runs of byte tokens decoded by themselves, as no word continues a character."""
    text, run = "", b""
    for word, is_byte in zip(words, are_bytes):
        if is_byte:
            run += word
        else:
            text, run = text + run.decode("utf-8", "replace") + word.decode(), b""
    return text + run.decode("utf-8", "replace")


@settings(max_examples=200, deadline=None)
@given(ids=st.lists(st.integers(0, 7), max_size=24))
def test_any_metaspace_ids_equal_the_whole(ids):
    tokenizer = TOKENIZERS["metaspace"]
    assert "".join(pieces(tokenizer, ids)) == tokenizer.backend.decode(ids)


@settings(max_examples=200, deadline=None)
@given(text=TEXT)
def test_the_generic_stream_never_shows_half_a_character(text):
    """A byte-level tokenizer seen as an unknown one: the window alone must hold back what is unfinished."""

    class Nothing:
        def get(self, token):
            return None

    tokenizer = TOKENIZERS["byte_level"]
    stream = WindowStream(tokenizer.backend, Nothing(), frozenset())
    ids = tokenizer.encode(text)
    said = [*(stream.push(i) for i in ids), stream.flush()]
    assert "".join(said) == text
    assert not any("\ufffd" in piece for piece in said)


def test_a_character_cut_off_at_the_end_becomes_a_replacement_character():
    tokenizer = TOKENIZERS["byte_level"]
    ids = tokenizer.encode("€")[:-1]
    assert pieces(tokenizer, ids) == ["", "", "\ufffd"]


def test_naive_decoding_fails_the_same_test():
    """Negative control: token by token, a character of several tokens falls apart."""
    tokenizer = TOKENIZERS["byte_level"]
    assert "\ufffd" in "".join(tokenizer.backend.decode([i]) for i in tokenizer.encode("€"))


def test_special_tokens_are_skipped_or_shown():
    tokenizer = TOKENIZERS["byte_level"]
    ids = [*tokenizer.encode("a"), tokenizer.token_id("<|end|>"), tokenizer.token_id("<fim prefix>")]
    assert tokenizer.decode(ids) == "a<fim prefix>"
    assert tokenizer.decode(ids, skip_special=False) == "a<|end|><fim prefix>"


def test_ids_past_the_tokenizer_say_nothing():
    for tokenizer in TOKENIZERS.values():
        assert tokenizer.decode([100_000]) == ""
        assert tokenizer.token_bytes(100_000) == b""


def test_bytes_of_single_tokens():
    assert TOKENIZERS["byte_level"].token_bytes(257) == "é".encode()
    assert TOKENIZERS["llama"].token_bytes(3 + 0xE2) == b"\xe2"
