"""The tokenizer against transformers, and its errors."""

import json
import shutil

import pytest
from tokenizers import processors

from llmopt.errors import ArtifactError, RequestError
from llmopt.runtime.tokenizer import Tokenizer
from tests.runtime.small_tokenizers import byte_fallback, byte_level, ours

TEXTS = [
    "Hello, world",
    " leading and  double  spaces ",
    "<|user|>Hi<|assistant|>",
    "naïve café 日本 👩‍🚀",
    "\n\n\ttabs",
]


@pytest.mark.parametrize(
    "config",
    [
        {},
        {"add_bos_token": True},
        {"add_bos_token": True, "add_eos_token": True},
        {"add_bos_token": False},
    ],
    ids=str,
)
@pytest.mark.parametrize("processor", ["as it is", "template"])
def test_ids_and_text_equal_transformers(embedded_model, tmp_path, config, processor):
    auto = pytest.importorskip("transformers").AutoTokenizer
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(embedded_model / name, tmp_path)
    raw = json.loads((tmp_path / "tokenizer_config.json").read_text())
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(raw | config))
    if processor == "template":
        backend = Tokenizer.load(tmp_path / "tokenizer.json").backend
        backend.post_processor = processors.TemplateProcessing(single="<|bos|> $A", special_tokens=[("<|bos|>", 0)])
        backend.save(str(tmp_path / "tokenizer.json"))
    ours = Tokenizer.load(tmp_path / "tokenizer.json", tmp_path / "tokenizer_config.json")
    theirs = auto.from_pretrained(tmp_path)
    for text in TEXTS:
        ids = theirs(text)["input_ids"]
        assert ours.encode(text) == ids
        assert ours.encode(text, special=False) == theirs(text, add_special_tokens=False)["input_ids"]
        assert ours.decode(ids) == theirs.decode(ids, skip_special_tokens=True)
        assert ours.decode(ids, skip_special=False) == theirs.decode(ids, skip_special_tokens=False)


def test_truncation_of_the_file_is_off():
    backend = byte_level()
    backend.enable_truncation(2)
    assert len(ours(backend).encode("abcdef")) == 6


def test_a_named_token_is_special_even_if_the_file_does_not_say_so():
    tokenizer = ours(byte_level(), eos_token={"content": "<fim prefix>"})
    assert tokenizer.token_id("<fim prefix>") in tokenizer.special_ids
    assert tokenizer.special_tokens == {"eos_token": "<fim prefix>"}


def test_a_named_token_that_does_not_exist_adds_no_id():
    size = ours(byte_fallback()).vocab_size
    assert ours(byte_fallback(), eos_token="<nowhere>").vocab_size == size


def test_a_lone_surrogate_is_a_request_error():
    with pytest.raises(RequestError, match="not valid Unicode at character 1"):
        ours(byte_level()).encode("a\ud800b")


@pytest.mark.parametrize("content", ["", "{}", "[1]", "{nope"])
def test_a_broken_file_is_an_artifact_error(tmp_path, content):
    path = tmp_path / "tokenizer.json"
    path.write_text(content)
    with pytest.raises(ArtifactError, match=r"tokenizer\.json: not a tokenizer"):
        Tokenizer.load(path)


@pytest.mark.parametrize(("content", "message"), [("{nope", "not readable as JSON"), ("[]", "expected a JSON object")])
def test_a_broken_config_is_an_artifact_error(embedded_model, tmp_path, content, message):
    path = tmp_path / "tokenizer_config.json"
    path.write_text(content)
    with pytest.raises(ArtifactError, match=message):
        Tokenizer.load(embedded_model / "tokenizer.json", path)
