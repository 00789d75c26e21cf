"""Settings: strict, the same by flag and by file, each of them in --help."""

from dataclasses import fields

import pytest
from click.testing import CliRunner

from llmopt.cli.serve import serve
from llmopt.errors import ConfigError
from llmopt.serve.config import load_options, load_settings, request_limits, scheduler_options
from llmopt.serve.engine_process import EngineOptions
from llmopt.serve.settings import Settings


@pytest.fixture
def written(tmp_path):
    def write(text):
        path = tmp_path / "serve.yaml"
        path.write_text(text)
        return path

    return write


def test_flags_go_over_the_file(written):
    file = written("port: 1234\nmax_sequences: 3\nswap_bytes: 5\nmax_waiting_per_key: 7\ncors_origins: [a, b]\n")
    settings = load_settings(file, {"port": 99, "request_timeout": 2.5})
    assert (settings.port, settings.max_sequences, settings.cors_origins) == (99, 3, ("a", "b"))
    assert load_options(settings).max_sequences == 3
    scheduler = scheduler_options(settings)
    assert (scheduler.swap.bytes, scheduler.queue.max_waiting_per_tenant) == (5, 7)
    assert request_limits(settings).seconds == 2.5
    assert load_settings(written(""), {}) == load_settings(None, {}) == Settings()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("prot: 1\n", "unknown setting 'prot' \\(did you mean port\\?\\)"),
        ("xyzzy: 1\n", "unknown setting 'xyzzy' \\(one of host"),
        ("port: many\n", "port: Input should be a valid integer"),
        ("port: -1\n", "port must be at least 0, not -1"),
        ("stuck_seconds: 0\n", "stuck_seconds must be at least"),
        ("log: xml\n", "log: Input should be 'json' or 'off'"),
        ("- 1\n", "expected settings"),
        ("a: [\n", "not YAML"),
        ("deterministic: true\nmax_sequences: 4\n", "deterministic runs one sequence a step"),
    ],
)
def test_what_is_wrong_is_named(written, text, message):
    with pytest.raises(ConfigError, match=message) as caught:
        load_settings(written(text), {})
    assert "serve.yaml" in str(caught.value)


def test_a_file_that_is_not_there(tmp_path):
    with pytest.raises(ConfigError, match="cannot read"):
        load_settings(tmp_path / "none.yaml", {})


def test_every_setting_is_in_help():
    text = CliRunner().invoke(serve, ["--help"]).output
    for setting in fields(Settings):
        assert f"--{setting.name.replace('_', '-')}" in text
        assert setting.metadata["what"].split()[0] in text


def test_options_survive_the_engines_command_line():
    settings = load_settings(None, {"chunk": 64, "swap_bytes": 9, "max_waiting": 3})
    options = EngineOptions("a", None, load_options(settings), scheduler_options(settings), settings.engine_nice)
    assert EngineOptions.from_json(options.to_json()) == options


def test_deterministic_means_one_sequence_a_step_and_no_shared_prefix():
    settings = load_settings(None, {"deterministic": True})
    assert load_options(settings).max_sequences == 1
    assert not scheduler_options(settings).prefix_cache
    assert load_options(Settings()).max_sequences == 8
    assert scheduler_options(Settings()).prefix_cache


def test_public_addresses():
    assert Settings(host="0.0.0.0").public
    assert Settings(host="my.host").public
    assert not Settings(host="::1").public
    assert not Settings().public
