"""The deployment examples in docs: settings that exist, metrics that exist, flags that exist."""

import json
import re
import shlex

import pytest
from click.testing import CliRunner
from prometheus_client.parser import text_string_to_metric_families

from llmopt.cli.serve import serve
from llmopt.serve.config import load_settings
from llmopt.serve.metrics import ServerMetrics


@pytest.fixture
def deploy(root):
    return root / "docs" / "deploy"


def test_the_settings_are_settings(deploy):
    assert load_settings(deploy / "serve.yaml", {}).max_sequences == 128


def exposed():
    """Names of every sample of /metrics."""
    metrics = ServerMetrics(lambda: {}, lambda: True)
    metrics.answered("/", 200)
    metrics.choice(1).close()
    families = text_string_to_metric_families(metrics.exposition().decode())
    return {sample.name for family in families for sample in family.samples}


def test_the_dashboard_asks_for_metrics_that_exist_and_for_all_of_them(deploy):
    panels = json.loads((deploy / "grafana.json").read_text())["panels"]
    asked = {name for p in panels for t in p["targets"] for name in re.findall(r"llmopt_\w+", t["expr"])}
    assert asked <= exposed()
    counted = {n for n in exposed() if not n.endswith(("_created", "_sum", "_count"))}
    assert counted == asked


def test_the_table_in_the_docs_names_every_metric(root):
    text = (root / "docs" / "serving.md").read_text()
    names = {re.sub("_(bucket|sum|count)$", "", n) for n in exposed() if not n.endswith("_created")}
    assert {n for n in names if n not in text} == set()


@pytest.mark.parametrize(
    ("file", "pattern"), [("llmopt.service", "ExecStart=(.*)"), ("Containerfile", "ENTRYPOINT (.*)")]
)
def test_the_command_lines_are_flags_of_serve(deploy, file, pattern):
    found = re.search(pattern, (deploy / file).read_text())[1]
    words = json.loads(found) if found.startswith("[") else shlex.split(found)
    help_text = CliRunner().invoke(serve, ["--help"]).output
    assert words[1] == "serve"
    assert all(word in help_text for word in words if word.startswith("--"))
    assert any(word.startswith("--") for word in words)
