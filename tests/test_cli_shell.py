"""The shell of the command line: exit codes, one line an error, colours, the lazy table."""

from __future__ import annotations

import errno
import importlib
import re

import click
import pytest

from llmopt import __version__, errors
from llmopt.cli import main

ROOT_TYPES = [e for e in vars(errors).values() if isinstance(e, type) and issubclass(e, errors.LlmoptError)]


@pytest.fixture
def failing(monkeypatch):
    """Replaces the command ``run`` by one that raises what it is given."""

    def install(error: BaseException) -> None:
        @click.command()
        def run() -> None:
            raise error

        monkeypatch.setattr(main.LazyGroup, "get_command", lambda self, ctx, name: run)

    return install


@pytest.mark.parametrize("name", main.COMMANDS)
def test_every_command_of_the_table_exists(name):
    module, _, attribute = main.COMMANDS[name][0].partition(":")
    command = getattr(importlib.import_module(module), attribute)
    assert isinstance(command, click.Command)
    assert command.name == name
    assert command.help


def test_help_lists_every_command(capsys):
    assert main.run(["--help"]) == 0
    text = capsys.readouterr().out
    assert re.findall(r"^  ([a-z-]+)  ", text, re.MULTILINE) == list(main.COMMANDS)


def test_version(capsys):
    assert main.run(["--version"]) == 0
    assert capsys.readouterr().out == f"llmopt {__version__}\n"


@pytest.mark.parametrize("cls", ROOT_TYPES, ids=lambda c: c.__name__)
def test_a_typed_error_is_one_line_with_its_exit_code(failing, capsys, cls):
    failing(cls("weights are\ntorn", where="layer 3", hint="copy again"))
    assert main.run(["run"]) == cls.exit_code
    streams = capsys.readouterr()
    assert streams.out == ""
    assert streams.err == "error: layer 3: weights are torn (copy again)\n"


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (KeyboardInterrupt(), 130, "error: interrupted"),
        (RuntimeError("a\nb"), 70, "error: internal error: RuntimeError: a b (set LLMOPT_DEBUG=1 for the traceback)"),
        (MemoryError(), 10, "error: out of memory"),
        (OSError(errno.ENOSPC, "No space left on device", "x.bin"), 10, "error: x.bin: No space left on device"),
    ],
)
def test_other_failures(failing, capsys, error, code, line):
    failing(error)
    assert main.run(["run"]) == code
    # click ends the line in which the terminal shows ^C
    assert capsys.readouterr().err.strip() == line


def test_debug_adds_the_traceback(failing, capsys, monkeypatch):
    monkeypatch.setenv("LLMOPT_DEBUG", "1")
    failing(RuntimeError("boom"))
    assert main.run(["run"]) == 70
    assert "Traceback" in capsys.readouterr().err


@pytest.mark.parametrize("arguments", [["nothing"], ["--nothing"], ["bench"], ["bench", "a", "--batch", "1,x"]])
def test_wrong_usage_is_one_line_and_exit_2(arguments, capsys):
    assert main.run(arguments) == 2
    err = capsys.readouterr().err
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert "--help)" in err


def test_colours_need_a_terminal_and_no_no_color(monkeypatch):
    monkeypatch.delenv("NO_COLOR", raising=False)
    assert main.colours(True)
    assert not main.colours(False)
    monkeypatch.setenv("NO_COLOR", "1")
    assert not main.colours(True)


def test_exit_codes_are_documented(root):
    text = (root / "docs" / "exit-codes.md").read_text("utf-8")
    documented = {int(code) for code in re.findall(r"^\| (\d+) \|", text, re.MULTILINE)}
    raised = {cls.exit_code for cls in ROOT_TYPES}
    assert documented == raised | {0, main.USAGE, main.INTERNAL, main.INTERRUPTED, main.OUT_OF_RESOURCE}
