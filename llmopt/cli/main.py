"""The llmopt command: a lazy group, typed errors on one line, documented exit codes."""

from __future__ import annotations

import errno
import importlib
import os
import sys
import traceback
from collections.abc import Sequence

import click

from llmopt import __version__
from llmopt.errors import LlmoptError

COMMANDS = {
    "compile": ("llmopt.cli.compile:compile_command", "Compile a checkpoint into an artifact."),
    "run": ("llmopt.cli.run:run", "Generate text from an artifact: a prompt, a chat or a JSONL file."),
    "serve": ("llmopt.cli.serve:serve", "Serve an artifact over the OpenAI API."),
    "plan": ("llmopt.cli.plan:plan", "Sizes, KV memory and the speed floor, before any build."),
    "bench": ("llmopt.cli.bench:bench", "Measure TTFT, ms a token, throughput and bandwidth."),
    "eval": ("llmopt.cli.eval:evaluate", "Perplexity of an artifact, and KL against a baseline."),
    "inspect": ("llmopt.cli.inspect:inspect", "Show what an artifact holds and how it was built."),
    "tune": ("llmopt.cli.tune:tune", "Measure kernel configurations for a model's shapes."),
    "make-checkpoint": ("llmopt.cli.make_checkpoint:make_checkpoint", "Write a checkpoint of random weights."),
}
"""Command name → (where its click command lives, its line in ``llmopt --help``)."""

USAGE, INTERNAL, INTERRUPTED, OUT_OF_RESOURCE = 2, 70, 130, 10


class LazyGroup(click.Group):
    """Imports a command's module only when that command runs, so that ``--help`` stays fast."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Names in the order of the table: the order of work, not of the alphabet."""
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """The click command of that name, or None."""
        if cmd_name not in COMMANDS:
            return None
        module, _, attribute = COMMANDS[cmd_name][0].partition(":")
        command: click.Command = getattr(importlib.import_module(module), attribute)
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """The command list of ``--help``, from the table alone."""
        with formatter.section("Commands"):
            formatter.write_dl([(name, summary) for name, (_, summary) in COMMANDS.items()])


@click.group(cls=LazyGroup, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(__version__, "-V", "--version", message="llmopt %(version)s")
def cli() -> None:
    """Compile a Hugging Face decoder ahead of time; run and serve the artifact without torch."""


def run(arguments: Sequence[str] | None = None) -> int:
    """Run one command line and return its exit code (docs/exit-codes.md); never raises."""
    color = False if os.environ.get("NO_COLOR") else None
    try:
        result = cli.main(arguments, prog_name="llmopt", standalone_mode=False, color=color)
        sys.stdout.flush()
        return result if isinstance(result, int) else 0
    except LlmoptError as error:
        return _fail(str(error), error.exit_code)
    except click.ClickException as error:
        return _fail(_usage_line(error), error.exit_code)
    except (click.Abort, KeyboardInterrupt):
        return _fail("interrupted", INTERRUPTED)
    except MemoryError:
        return _fail("out of memory", OUT_OF_RESOURCE)
    except OSError as error:
        return _os_error(error)
    except Exception as error:
        what = f"internal error: {type(error).__name__}: {error}"
        return _fail(f"{what} (set LLMOPT_DEBUG=1 for the traceback)", INTERNAL)


def _fail(message: str, code: int) -> int:
    """One line on stderr; with LLMOPT_DEBUG=1 the traceback before it."""
    if os.environ.get("LLMOPT_DEBUG") == "1":
        traceback.print_exc()
    prefix = click.style("error:", fg="red", bold=True) if colours(sys.stderr.isatty()) else "error:"
    print(prefix, " ".join(message.split()), file=sys.stderr)
    return code


def _usage_line(error: click.ClickException) -> str:
    """click's message with the command whose help explains it."""
    context = getattr(error, "ctx", None)
    help_of = context.command_path if context else "llmopt"
    return f"{error.format_message().rstrip('.')} (see {help_of} --help)"


def _os_error(error: OSError) -> int:
    """The machine said no: a closed pipe is a quiet end, anything else a resource error."""
    if error.errno == errno.EPIPE:
        # Python flushes stdout at exit and would complain again: point it at nothing.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    where = f"{error.filename}: " if error.filename else ""
    return _fail(f"{where}{error.strerror or error}", OUT_OF_RESOURCE)


def colours(terminal: bool) -> bool:
    """Whether to colour: on a terminal, unless NO_COLOR is set."""
    return terminal and not os.environ.get("NO_COLOR")


def main() -> None:
    """Console entry point."""
    sys.exit(run())


if __name__ == "__main__":
    main()
