"""Artifacts: the directory a compiled model lives in (docs/artifact-format.md). Needs numpy only."""

from llmopt.artifact.manifest import Golden, Manifest
from llmopt.artifact.reader import Artifact
from llmopt.artifact.writer import BuildInfo, WeightsPlan, write_artifact

__all__ = ["Artifact", "BuildInfo", "Golden", "Manifest", "WeightsPlan", "write_artifact"]
