"""Stop strings and request streams against brute force over whole texts."""

from hypothesis import given, settings
from hypothesis import strategies as st

from llmopt.runtime.core import TokenOutput
from llmopt.runtime.protocol import Sampled
from llmopt.runtime.stopping import StopMatcher
from llmopt.runtime.stream import RequestStream
from tests.runtime.small_tokenizers import byte_level, ours

STOPS = st.lists(st.text("ab", min_size=1, max_size=4), max_size=4)


def brute(text, stops):
    """Where the text is cut: at the first character that completes a stop string; the longest one of those."""
    for end in range(len(text) + 1):
        hits = [s for s in stops if text[:end].endswith(s)]
        if hits:
            return text[: end - len(max(hits, key=len))], max(hits, key=len)
    return text, None


@settings(max_examples=500)
@given(st.lists(st.text("abc", max_size=4), max_size=8), STOPS)
def test_the_first_completed_stop_ends_the_text(parts, stops):
    matcher, said, hit = StopMatcher(stops), "", None
    whole = "".join(parts)
    expected, expected_hit = brute(whole, stops)
    for part in parts:
        text, hit = matcher.push(part)
        said += text
        assert expected.startswith(said), "a part of the stop string got out"
        if hit is not None:
            break
    else:
        said += matcher.flush()
    assert (said, hit) == (expected, expected_hit)


@given(st.text("abc", max_size=10), st.text("ab", min_size=1, max_size=3))
def test_nothing_is_held_longer_than_needed(text, stop):
    matcher = StopMatcher([stop])
    said, hit = matcher.push(text)
    if hit is None:
        held = text[len(said) :]
        assert held == "" or stop.startswith(held)


def test_without_stop_strings_nothing_is_held():
    assert StopMatcher([]).push("abc") == ("abc", None)


TOKENIZER = ours(byte_level())


@settings(max_examples=300, deadline=None)
@given(st.text("ab €é", max_size=16), st.lists(st.text("ab €", min_size=1, max_size=3), max_size=2), st.booleans())
def test_a_stream_tells_text_and_tokens_in_step(text, stops, ended):
    ids = TOKENIZER.encode(text)
    end = TOKENIZER.token_id("<|end|>")
    tokens = [*ids, end] if ended else ids
    stream, deltas = RequestStream(TOKENIZER.stream(), stops), []
    for i, token in enumerate(tokens):
        reason = None if i < len(tokens) - 1 else "stop" if ended else "length"
        deltas.append(stream.push(TokenOutput(1, Sampled(token), reason)))
        if deltas[-1].finish_reason:
            break
    if not deltas:
        return
    expected, hit = brute(text, stops)
    assert "".join(d.text for d in deltas) == expected
    assert deltas[-1].stop_reason == (hit if hit is not None else end if ended else None)
    assert all(d.finish_reason is None for d in deltas[:-1])
    said = [t.token for d in deltas for t in d.tokens]
    if hit is None:
        assert said == tokens
    else:
        assert said == tokens[: len(said)]
        shown = TOKENIZER.decode(said).rstrip("\ufffd")
        assert shown.startswith(expected) or expected.startswith(shown)
        assert len(TOKENIZER.decode(said[:-1]).rstrip("\ufffd")) <= len(expected)
