"""The sections of ``llmopt inspect`` as rows of text: manifest, KV plan, passes, coverage ledger, sizes."""

from __future__ import annotations

from math import prod
from typing import Any

from llmopt.artifact import Artifact, Manifest
from llmopt.program import dtype_bytes
from llmopt.report.units import human_bytes

Row = tuple[object, ...]
KINDS = ("compiled", "generic", "eager")


def manifest_pairs(manifest: Manifest, verified: bool) -> list[tuple[str, object]]:
    """The manifest's facts, one a line."""
    dims = ", ".join(f"{name} {low}-{high}" for name, (low, high) in manifest.dims.items())
    versions = ", ".join(f"{name} {version}" for name, version in manifest.versions.items())
    golden = sum(len(entry["tokens"]) for entry in manifest.golden)
    proven = ", ".join(f"{arch} {what}" for arch, what in manifest.notes.get("proven", {}).items())
    return [
        ("model", manifest.model),
        ("target", f"{manifest.target}, {manifest.dtype}"),
        *([("kernels", proven)] if proven else []),
        ("context", f"{manifest.max_context} tokens, vocabulary {manifest.vocab_size}"),
        ("entry points", ", ".join(f"{entry} -> {name}" for entry, name in manifest.entry_points.items())),
        ("dims", dims or "-"),
        ("golden", f"{golden} tokens in {len(manifest.golden)} sequences" if golden else "none"),
        ("accuracy", accuracy_line(manifest.accuracy)),
        ("source", f"checkpoint sha256 {manifest.source[:16]}"),
        ("built with", versions),
        ("digests", "all files and weights verified" if verified else "not verified"),
    ]


def accuracy_line(found: dict[str, Any]) -> str:
    """What quantizing cost, when the build measured it."""
    if not found:
        return "not measured"
    base = found["baseline"]
    change = f"perplexity {base['change']['value']:+.2%}, KL {base['kl_mean']:.2e}, same first choice"
    return f"{change} {base['top1_agreement']:.1%} on {found['scored_tokens']} held-out tokens"


def crossover_rows(manifest: Manifest) -> list[Row]:
    """One row a shape of the quantized linears and architecture: from how many rows on bfloat16 is no slower."""
    return [
        (arch, entry["weights"], f"{entry['n']}x{entry['k']}", crossover(entry))
        for arch, entries in manifest.notes.get("crossover", {}).items()
        for entry in entries
    ]


def crossover(entry: dict[str, Any]) -> str:
    """The row count, or why there is none."""
    if not entry["us"]:
        return "not measured"
    return f"{entry['rows']} rows" if entry["rows"] else f"none up to {max(map(int, entry['us']))} rows"


def state_rows(manifest: Manifest) -> list[Row]:
    """One row a state group."""
    return [
        (g["name"], g["kind"], len(g["layers"]), g["block_size"], human_bytes(g["block_bytes"]), g["window"])
        for g in manifest.states
    ]


def pass_rows(report: dict[str, Any], log: dict[str, Any] | None) -> list[Row]:
    """One row a pass, in order; milliseconds from the build log when it lists the same passes."""
    passes, timed = report["passes"], (log or {}).get("passes", [])
    known = [p.get("name") for p in timed] == [p["name"] for p in passes]
    times = [f"{p['ms']:.1f}" for p in timed] if known else [None] * len(passes)
    return [(p["name"], p["rewrites"], p["nodes_before"], p["nodes_after"], ms) for p, ms in zip(passes, times)]


def ledger_rows(ledger: dict[str, Any]) -> list[Row]:
    """Shares of FLOPs and bytes, and counts of nodes, by how the frontend captured them."""
    shares: list[Row] = [
        (name, *(f"{ledger[key][kind]:.2%}" for kind in KINDS))
        for name, key in (("FLOPs", "flops"), ("bytes", "bytes"))
    ]
    return [*shares, ("nodes", *(ledger["nodes"][kind] for kind in KINDS))]


def gap_lines(ledger: dict[str, Any], most: int = 12) -> list[str]:
    """What is not compiled, costliest first: ``generic aten.pow, 3 nodes in model.layers.0.mlp``."""
    gaps = ledger["gaps"]
    lines = [f"{g['kind']} {g['op']}, {g['nodes']} nodes in {g['scope'] or 'the model'}" for g in gaps[:most]]
    return [*lines, f"and {len(gaps) - most} more (--json lists them)"] if len(gaps) > most else lines


def size_rows(artifact: Artifact, report: dict[str, Any]) -> list[Row]:
    """Bytes of the checkpoint's tensors, of what became of them, of every file, and of a token's state."""
    manifest = artifact.manifest
    files = sorted(manifest.files.items(), key=lambda item: (-item[1].bytes, item[0]))
    rows: list[Row] = [("checkpoint", human_bytes(report["bytes"]["checkpoint"]))]
    rows.append((f"weights, {manifest.weights.kind}", human_bytes(stored_weights(manifest))))
    rows += [(name, human_bytes(entry.bytes)) for name, entry in files]
    return [*rows, ("KV, a token", human_bytes(report["bytes"]["kv_per_token"]))]


def stored_weights(manifest: Manifest) -> int:
    """Bytes of the weights as loaded: the file, and tensors drawn from a seed."""
    drawn = sum(prod(t.shape) * dtype_bytes(t.dtype) for t in manifest.weights.random.values())
    return manifest.weights.bytes + drawn
