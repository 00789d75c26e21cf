"""Typed errors: one class per cause, each with a documented exit code (docs/exit-codes.md)."""

from __future__ import annotations


class LlmoptError(Exception):
    """Base of every error llmopt raises on purpose.

    ``what`` says what is wrong, ``where`` names the layer, tensor, file or line, ``hint`` what to do.
    The message is one line; the CLI prints it and exits with ``exit_code``.
    """

    exit_code = 1

    def __init__(self, what: str, *, where: str | None = None, hint: str | None = None) -> None:
        self.what, self.where, self.hint = what, where, hint
        message = f"{where}: {what}" if where else what
        if hint:
            message += f" ({hint})"
        super().__init__(" ".join(message.split()))


class ConfigError(LlmoptError):
    """A recipe, flag or configuration file is wrong (unknown key, bad value, unknown pass)."""

    exit_code = 3


class CheckpointError(LlmoptError):
    """A checkpoint is unreadable, truncated, inconsistent with its config, or unsafe."""

    exit_code = 4


class UnsupportedModelError(LlmoptError):
    """The frontend cannot capture a module of this model; the message names it."""

    exit_code = 5


class PassError(LlmoptError):
    """A pass's ``requires`` does not hold, its result does not verify, or ``expect`` was missed."""

    exit_code = 6


class DriftError(PassError):
    """``--check-passes`` found a pass that changes the numerics."""

    exit_code = 7


class TargetError(LlmoptError):
    """A target is unknown or cannot emit a call of the program; the message names it."""

    exit_code = 8


class ArtifactError(LlmoptError):
    """An artifact is damaged, of another format version, or points outside its directory."""

    exit_code = 9


class ResourceError(LlmoptError):
    """The machine lacks something: disk space, memory, a free port, a library."""

    exit_code = 10


class RequestError(LlmoptError):
    """A generation request is invalid: empty, too long, not UTF-8, bad parameter."""

    exit_code = 11


class OverloadError(RequestError):
    """The request is fine and the server cannot take it now. ``retry_after``: seconds after which to ask again."""

    def __init__(
        self, what: str, *, retry_after: float = 1.0, where: str | None = None, hint: str | None = None
    ) -> None:
        super().__init__(what, where=where, hint=hint)
        self.retry_after = retry_after


class QueueFullError(OverloadError):
    """A bounded queue is full. ``own``: it is the caller's own share (HTTP 429), not everybody's queue (503)."""

    def __init__(
        self,
        what: str,
        *,
        retry_after: float = 1.0,
        own: bool = False,
        where: str | None = None,
        hint: str | None = None,
    ) -> None:
        super().__init__(what, retry_after=retry_after, where=where, hint=hint)
        self.own = own


class DeadlineError(OverloadError):
    """The request's deadline passed before it could be answered."""


class ExecutorError(LlmoptError):
    """The executor failed or its golden-token gate did; the engine is dead."""

    exit_code = 12
