"""Tool-call formats: texts cut anywhere parse alike, nothing is lost, grammars allow exactly what parsers read."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken

from llmopt.errors import ConfigError
from llmopt.runtime.grammar import GrammarCompiler
from llmopt.runtime.tokenizer import Tokenizer
from llmopt.serve.tools import ToolSpec, detect_format, format_names, tool_format
from llmopt.serve.tools.constrain import tool_grammar

A, B = {"x": 1}, {"s": 'a "b" {c}\\ </tool_call> ]', "list": [1, {"y": None}], "t": True}
CALLS = {
    "hermes": lambda *calls: "\n".join(
        f'<tool_call>\n{{"name": "{n}", "arguments": {json.dumps(a)}}}\n</tool_call>' for n, a in calls
    ),
    "llama3": lambda *calls: "; ".join(f'{{"name": "{n}", "parameters": {json.dumps(a)}}}' for n, a in calls),
    "mistral": lambda *calls: (
        "[TOOL_CALLS][" + ", ".join(json.dumps({"name": n, "arguments": a}) for n, a in calls) + "]"
    ),
}


CALLS["mistral_args"] = lambda *calls: "".join(f"[TOOL_CALLS]{n}[ARGS]{json.dumps(a)}" for n, a in calls)


def parse(name, *pieces):
    """Content and calls of an answer that comes in pieces."""
    parser = tool_format(name).parser()
    content, calls = "", []
    for step in [*(lambda p=p: parser.push(p) for p in pieces), parser.flush]:
        said, deltas = step()
        content += said
        for delta in deltas:
            if delta.name is not None:
                assert delta.index == len(calls)
                calls.append([delta.name, ""])
            calls[delta.index][1] += delta.arguments
    assert parser.calls == len(calls)
    return content, [tuple(c) for c in calls]


def cut(text, data):
    places = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=12)))
    return [text[a:b] for a, b in zip([0, *places], [*places, len(text)])]


@pytest.mark.parametrize("name", sorted(CALLS))
@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_calls_cut_anywhere(name, data):
    expected = [("f", json.dumps(A)), ("g_1", json.dumps(B)), ("f", "{}")]
    text = CALLS[name](("f", A), ("g_1", B), ("f", {}))
    assert parse(name, *cut(text, data)) == ("", expected)


@pytest.mark.parametrize("name", ["hermes", "mistral", "mistral_args"])
@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_text_before_a_call(name, data):
    text = "Let me see <tool [TOOL_ .\n" + CALLS[name](("f", A))
    assert parse(name, *cut(text, data)) == ("Let me see <tool [TOOL_ .", [("f", json.dumps(A))])


PROSE = [
    "",
    " ",
    "Hello.\n",
    "a < b",
    "<tool_call",
    '<tool_call>\n{"nome": "f"}\n</tool_call>',
    "<tool_call>no json</tool_call> after",
    '<tool_call>{"name": "f"',
    '{"name": "f", "para',
    '{"answer": 42}',
    '{"name": "f"} and {more}',
    "[TOOL_CALLS] nothing",
    "{",
    "<|python",
    "{}{}",
]


@pytest.mark.parametrize("name", sorted(CALLS))
@pytest.mark.parametrize("text", PROSE)
@settings(max_examples=20, deadline=None)
@given(data=st.data())
def test_what_is_no_call_is_content(name, text, data):
    content, calls = parse(name, *cut(text, data))
    if not calls:
        assert content == text
    assert (content, calls) == parse(name, text)
    if name == "llama3" or text.startswith("{"):
        return
    assert calls == []


def test_a_call_without_arguments_and_one_with_arguments_in_a_string():
    assert parse("llama3", '{"name": "f"}') == ("", [("f", "")])
    text = '<tool_call>{"arguments": "{\\"x\\": 1}", "name": "f"}</tool_call>'
    assert parse("hermes", text) == ("", [("f", '{"x": 1}')])


def test_a_call_that_is_cut_short_keeps_what_it_has():
    assert parse("hermes", '<tool_call>\n{"name": "f", "arguments": {"x": 1') == ("", [("f", '{"x": 1')])


def test_a_broken_call_does_not_swallow_what_follows():
    text = '<tool_call>{"name": "f", "arguments": {"x": oops}}</tool_call>\n' + CALLS["hermes"](("g", A))
    assert parse("hermes", text)[1][-1] == ("g", json.dumps(A))


def test_arguments_stream_as_they_come():
    parser = tool_format("hermes").parser()
    parser.push('<tool_call>\n{"name": "f", "arg')
    seen = [parser.push(piece)[1] for piece in ('uments": {"te', 'xt": "on', "e two", '"}', "}")]
    assert [[d.arguments for d in deltas if d.arguments] for deltas in seen] == [
        ['{"te'], ['xt": "on'], ["e two"], ['"}'], []
    ]  # fmt: skip


def test_the_python_tag_is_no_text():
    assert parse("llama3", "<|python_", 'tag|>{"name": "f", "parameters": {}}') == ("", [("f", "{}")])


def test_detection_by_template():
    assert detect_format("{{ '<tool_call>' }}").name == "hermes"
    assert detect_format("{{ '<|python_tag|>' }}").name == "llama3"
    assert detect_format("{{ '[TOOL_CALLS]' }}").name == "mistral"
    assert detect_format("{{ '[TOOL_CALLS]' ~ name ~ '[ARGS]' }}").name == "mistral_args"
    assert detect_format("{{ x }}").name == detect_format(None).name == "hermes"
    with pytest.raises(ConfigError, match="did you mean mistral"):
        tool_format("mistrall")
    assert format_names() == sorted(CALLS)


def test_mistral_ids_are_nine_characters():
    assert len(tool_format("mistral").new_id()) == 9
    assert tool_format("hermes").new_id() != tool_format("hermes").new_id()


TOOLS = [
    ToolSpec("f", {"type": "object", "properties": {"x": {"type": "integer"}}, "required": ["x"]}),
    ToolSpec(
        "g_1",
        {
            "$defs": {"S": {"type": "string", "maxLength": 5}},
            "type": "object",
            "properties": {"s": {"$ref": "#/$defs/S"}},
            "required": ["s"],
            "additionalProperties": False,
        },
    ),
]


@pytest.fixture(scope="module", params=["plain", "markers"])
def compiler(request, embedded_model):
    tokenizer = Tokenizer.load(embedded_model / "tokenizer.json", embedded_model / "tokenizer_config.json")
    if request.param == "markers":
        tokenizer.backend.add_special_tokens([AddedToken(t, special=True) for t in ("[TOOL_CALLS]", "[ARGS]")])
        tokenizer.backend.add_tokens([AddedToken("<tool_call>"), AddedToken("</tool_call>")])
    return GrammarCompiler(tokenizer, tokenizer.vocab_size, (1,)), tokenizer


def accepts(compiler, grammar, text):
    """Whether a text is in the grammar, as the tokenizer writes it."""
    matcher = compiler[0].compile(grammar)
    ids = compiler[1].encode(text, special=False)
    return matcher.try_consume_tokens(ids) == len(ids) and matcher.is_accepting()


@pytest.mark.parametrize("name", sorted(CALLS))
def test_grammars(compiler, name):
    pytest.importorskip("llguidance")
    form, write = tool_format(name), CALLS[name]
    token = compiler[1].token_id

    def allows(text, **how):
        return accepts(compiler, tool_grammar(form, TOOLS, token, **how), text)

    one, two = write(("f", A)), write(("f", A), ("g_1", {"s": "abc"}))
    bad = [write(("f", {"x": "1"})), write(("h", A)), write(("g_1", {"s": "abcdef"})), write(("g_1", A))]
    text, schema = {"must_call": False}, {"must_call": False, "answer": {"type": "object", "required": ["a"]}}
    for how in ({"must_call": True}, text, schema):
        assert allows(one, many=False, **how)
        assert allows(two, many=True, **how)
        assert not allows(two, many=False, **how)
        assert not any(allows(t, many=True, **how) for t in bad)
        assert allows("Hello", many=True, **how) == (how is text)
        assert allows('{"a": 1}', many=True, **how) == (how is schema or (how is text and name != "llama3"))
    assert allows("Hello " + one, many=True, **text)  # for llama3 it is text from the first character on


def test_references_inside_arguments(compiler):
    recursive = {
        "$defs": {"S": {"type": "string", "maxLength": 3}},
        "type": "object",
        "properties": {"s": {"$ref": "#/$defs/S"}, "next": {"$ref": "#"}},
        "required": ["s"],
        "additionalProperties": False,
    }
    tools = [ToolSpec("f", recursive)]
    grammar = tool_grammar(tool_format("llama3"), tools, compiler[1].token_id, must_call=True, many=True)
    for depth, good in (
        ({"s": "a"}, True),
        ({"s": "a", "next": {"s": "b"}}, True),
        ({"s": "a", "next": {"s": "long"}}, False),
    ):
        assert accepts(compiler, grammar, CALLS["llama3"](("f", depth))) == good
