"""Chat templates against transformers' rendering, and templates that try to escape."""

import json

import pytest

from llmopt.errors import ArtifactError, CheckpointError, RequestError
from llmopt.runtime.chat import ChatTemplate, check_chat_template, load_chat_template

HELLO = [{"role": "user", "content": "Hällo <b>"}]
TALK = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Hi\n there"},
    {"role": "assistant", "content": "Yes?"},
    {"role": "user", "content": "日本 & 'quotes'"},
]
TEMPLATES = {
    "blocks": """
{% for m in messages %}
    {% if m.role == 'system' %}
<<{{ m.content | trim }}>>
    {% else %}
[{{ m['role'] | upper }}] {{ m['content'] }}
    {% endif %}
{% endfor %}
{% if add_generation_prompt %}
>
{% endif %}""",
    "loopcontrols": "{% for m in messages %}{% if loop.index0 == 2 %}{% break %}{% endif %}"
    "{{ m.content }}|{% endfor %}",
    "tojson": "{{ messages | tojson }}{{ messages[0] | tojson(indent=2) }}{{ {'a': '<é>'} | tojson }}",
    "tokens": "{{ bos_token }}{% for m in messages %}{{ m.content + eos_token }}{% endfor %}",
    "namespace": "{% set ns = namespace(n=0) %}{% for m in messages %}"
    "{% set ns.n = ns.n + m.content|length %}{% endfor %}{{ ns.n }}",
    "generation": "{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %}{% endfor %}",
    "macro": "{% macro turn(m) %}{{ m.role }}: {{ m.content }}\n{% endmacro %}"
    "{% for m in messages %}{{ turn(m) }}{% endfor %}",
    "undefined": "{{ nothing }}{% if tools %}tools{% endif %}{{ messages[0].name is defined }}",
    "dict": "{% set d = dict(a=1) %}{% for k, v in d.items() %}{{ k }}{{ v }}{% endfor %}",
    "methods": "{{ messages[0].content.split()[0].strip('x').replace('H', 'J').startswith('J') }}"
    "{{ messages[-1]['content'][::-1] }}",
    "printf": "{{ '%s=%03d' % ('a', 7) }}{{ 3 * 'ab' }}{{ 2 ** 5 }}",
}


@pytest.mark.parametrize("generate", [True, False])
@pytest.mark.parametrize("messages", [HELLO, TALK], ids=["one", "talk"])
@pytest.mark.parametrize("name", TEMPLATES)
def test_rendering_equals_transformers(name, messages, generate):
    utils = pytest.importorskip("transformers.utils.chat_template_utils")
    tokens = {"bos_token": "<s>", "eos_token": "</s>"}
    source = TEMPLATES[name]
    [[expected], _] = utils.render_jinja_template(
        [messages], chat_template=source, add_generation_prompt=generate, **tokens
    )
    assert ChatTemplate(source, tokens).render(messages, generate) == expected


def test_the_embedded_model_equals_transformers(embedded_model):
    auto = pytest.importorskip("transformers").AutoTokenizer
    theirs = auto.from_pretrained(embedded_model).apply_chat_template(TALK, tokenize=False, add_generation_prompt=True)
    assert ChatTemplate((embedded_model / "chat_template.jinja").read_text(), {}).render(TALK) == theirs


def test_strftime_now():
    assert ChatTemplate("{{ strftime_now('%Y') | int > 2000 }}", {}).render(HELLO) == "True"


ESCAPES = [
    "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "{{ messages.__class__ }}",
    "{{ messages[0]['content'].__init__.__globals__ }}",
    "{{ raise_exception.__globals__['sys'] }}",
    "{{ strftime_now.__code__ }}",
    "{{ ''['__cl' + 'ass__']['__ba' + 'se__'] }}",
    "{{ (''|attr('__class__'))|string }}",
    "{{ '{0.__class__.__base__}'.format('') }}",
    "{% set x = messages.append({'role': 'a'}) %}{{ messages|length }}",
    "{% set ns = namespace(__class__=1) %}",
    "{% set ns = namespace() %}{% set ns.__x = 1 %}",
    "{{ cycler.__init__.__globals__.os }}",
    "{{ joiner.__init__ }}{{ lipsum.__globals__ }}",
    "{{ self.__init__.__globals__ }}",
    "{{ 'a' * 10 ** 10 }}",
    "{{ [0] * 99999999999 }}",
    "{{ 10 ** 10 ** 10 }}",
    "{{ 2 ** 100000000 }}",
    "{% for i in range(99999) %}{% for j in range(99999) %}{{ 'x' * 100000 }}{% endfor %}{% endfor %}",
]


@pytest.mark.parametrize("source", ESCAPES)
def test_a_template_that_tries_to_escape_is_an_artifact_error(source):
    template = ChatTemplate(source, {})
    with pytest.raises(ArtifactError, match=r"^chat template: it tries to leave its sandbox") as caught:
        template.render(HELLO)
    assert "\n" not in str(caught.value)
    with pytest.raises(ArtifactError):
        template.check()


@pytest.mark.parametrize("source", TEMPLATES.values(), ids=TEMPLATES)
def test_honest_templates_pass_the_check(source):
    ChatTemplate(source, {}).check()


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("{{ raise_exception('roles must alternate') }}", "refuses this conversation: roles must alternate"),
        ("{{ nothing.attribute }}", "cannot render"),
        ("{{ messages[7].content + 1 }}", "cannot render"),
        ("{{ 1 / 0 }}", "cannot render"),
        ("{% for i in range(10 ** 7) %}{% endfor %}", "Range too big"),
        ("{{ 1 + 'a' }}", "cannot render"),
    ],
)
def test_a_conversation_it_cannot_render_is_a_request_error(source, message):
    with pytest.raises(RequestError, match=message):
        ChatTemplate(source, {}).render(HELLO)


def test_bad_syntax_is_an_artifact_error_with_its_line():
    with pytest.raises(ArtifactError, match="chat template line 2: bad syntax"):
        ChatTemplate("a\n{% for %}", {})


def test_templates_are_found_in_the_config():
    assert ChatTemplate.from_config({}) is None
    assert ChatTemplate.from_config({"chat_template": "x"}).render(HELLO) == "x"
    named = [{"name": "tool_use", "template": "t"}, {"name": "default", "template": "d"}]
    assert ChatTemplate.from_config({"chat_template": named}).render(HELLO) == "d"
    assert ChatTemplate.from_config({"chat_template": named[:1]}) is None


def files(folder, template=None, config=None):
    """Tokenizer files of a checkpoint, as written."""
    found = {}
    for name, content in (("chat_template.jinja", template), ("tokenizer_config.json", config)):
        if content is not None:
            found[name] = folder / name
            found[name].write_bytes(content)
    return found


def test_a_template_file_goes_before_the_config(tmp_path):
    config = b'{"chat_template": "{{ eos_token }}", "eos_token": "<e>"}'
    assert load_chat_template({}) is None
    assert load_chat_template(files(tmp_path, config=config)).render(HELLO) == "<e>"
    assert load_chat_template(files(tmp_path, b"file {{ eos_token }}", config)).render(HELLO) == "file <e>"


@pytest.mark.parametrize(
    ("template", "config", "message"),
    [
        (ESCAPES[0].encode(), None, "chat template: it tries to leave its sandbox"),
        (None, json.dumps({"chat_template": ESCAPES[1]}).encode(), "chat template: it tries to leave its sandbox"),
        (b"{% if %}", None, "chat template line 1: bad syntax"),
        (b"\xff", None, "chat_template.jinja: cannot read"),
        (None, b"{", "tokenizer_config.json: not readable as JSON"),
    ],
)
def test_a_bad_template_is_a_checkpoint_error_before_any_build(tmp_path, template, config, message):
    found = files(tmp_path, template, config)
    with pytest.raises(CheckpointError) as caught:
        check_chat_template(found)
    assert str(caught.value).startswith(message)
    with pytest.raises(ArtifactError):
        load_chat_template(found)


def test_text_parts_are_joined_and_others_refused():
    template = ChatTemplate("{{ messages[0].content }}", {})
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    assert template.render([{"role": "user", "content": parts}]) == "ab"
    with pytest.raises(RequestError, match="part of type 'image_url' is not supported"):
        template.render([{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}])
    with pytest.raises(RequestError, match="no messages"):
        template.render([])
