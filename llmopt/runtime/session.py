"""Opens an artifact for generation: tokenizer, chat template, executor and engine."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from types import TracebackType

from llmopt.artifact import Artifact
from llmopt.runtime.chat import CONFIG_FILE, TEMPLATE_FILE, ChatTemplate, load_chat_template
from llmopt.runtime.engine import Engine
from llmopt.runtime.executors import load_executor
from llmopt.runtime.protocol import Executor
from llmopt.runtime.tokenizer import Tokenizer
from llmopt.target import LoadOptions

TOKENIZER = "tokenizer.json"


@dataclass(frozen=True)
class Session:
    """An artifact that is loaded and ready. A context manager: leaving it frees the executor."""

    artifact: Artifact
    tokenizer: Tokenizer
    executor: Executor
    engine: Engine

    @cached_property
    def chat(self) -> ChatTemplate | None:
        """The chat template, or None when the artifact has none."""
        return load_chat(self.artifact)

    def close(self) -> None:
        """Free the executor."""
        self.engine.close()

    def __enter__(self) -> Session:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def open_session(path: Path | str, options: LoadOptions, weights: Path | str | None = None) -> Session:
    """Check and load an artifact. ``weights``: the directory of weights that are not inside it.

    Raises ArtifactError, TargetError, ResourceError or ExecutorError, each saying what is wrong.
    """
    artifact = Artifact.open(path, weights=weights, defer=True)
    tokenizer = load_tokenizer(artifact)
    executor = load_executor(artifact, options)
    engine = Engine(executor, tokenizer, artifact.manifest.eos_token_ids)
    return Session(artifact, tokenizer, executor, engine)


def load_tokenizer(artifact: Artifact) -> Tokenizer:
    """The artifact's tokenizer; raises ArtifactError when it has none."""
    config = artifact.file(CONFIG_FILE) if artifact.has_file(CONFIG_FILE) else None
    return Tokenizer.load(artifact.file(TOKENIZER), config)


def load_chat(artifact: Artifact) -> ChatTemplate | None:
    """The artifact's chat template, None when it has none; raises ArtifactError when it is unsafe."""
    names = [name for name in (TEMPLATE_FILE, CONFIG_FILE) if artifact.has_file(name)]
    return load_chat_template({name: artifact.file(name) for name in names})
