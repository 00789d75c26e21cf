"""A compile worker: reads jobs as JSON lines, writes each cubin aside and answers with what the compiler said.

Runs as ``python -m …worker`` in its own process, so that Triton neither sees the build's settings (interpreter
mode, caches) nor shares its lock.
"""

from __future__ import annotations

import importlib
import json
import re
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from .nvrtc import compile_source

SWIZZLE_BYTES = (0, 32, 64, 128)
DESCRIPTOR = re.compile(r"tensordesc<\w+\[([\d, ]+)\],(\d+)>")


def compile_job(job: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Compile one specialization; the cubin goes to ``job["out"]``."""
    if job["source"]:
        cubin = compile_source(job)
        Path(job["out"]).write_bytes(cubin)
        registers, spills = resources(cubin, job["function"], folder)
        threads, shared = 32 * job["num_warps"], job["shared"]
        maps = [read_map(type_) for _, type_ in job["signature"] if type_.startswith("tensordesc")]
        return {"symbol": job["function"], "threads": threads, "shared": shared, "registers": registers,
                "spills": spills, "tensor_maps": maps}  # fmt: skip
    from triton.backends.compiler import GPUTarget  # type: ignore[import-untyped]
    from triton.compiler import ASTSource, compile  # type: ignore[import-untyped]
    from triton.experimental.gluon._runtime import GluonASTSource  # type: ignore[import-untyped]

    function = getattr(importlib.import_module(job["module"]), job["function"])
    signature = dict(job["signature"])
    constexprs = dict(job["constexprs"])
    unknown = set(function.arg_names) ^ (set(signature) | set(constexprs))
    if unknown:
        raise ValueError(f"parameters {sorted(unknown)} are not in both the function and the specialization")
    ordered = {name: signature.get(name, "constexpr") for name in function.arg_names}
    aligned = {
        (function.arg_names.index(name),): [["tt.divisibility", 16]]
        for name, type_ in signature.items()
        if type_.startswith("*") and name not in job["unaligned"]
    }
    if function.is_gluon():
        source = GluonASTSource(function, ordered, constexprs, aligned)
    else:
        source = ASTSource(function, ordered, constexprs, aligned)
    options = {"num_warps": job["num_warps"], "num_stages": job["num_stages"]}
    compiled = compile(source, target=GPUTarget("cuda", job["arch"], 32), options=options)
    meta = compiled.metadata
    if meta.global_scratch_size or meta.profile_scratch_size:
        raise ValueError("the kernel wants global scratch from the launcher, which llmopt's launcher does not give")
    if meta.num_ctas != 1:
        raise ValueError("clusters are not supported by the launch plan")
    Path(job["out"]).write_bytes(compiled.asm["cubin"])
    registers, spills = resources(compiled.asm["cubin"], meta.name, folder)
    return {
        "symbol": meta.name,
        "threads": 32 * meta.num_warps,
        "shared": meta.shared,
        "registers": registers,
        "spills": spills,
        "tensor_maps": [[m["block_size"], SWIZZLE_BYTES[m["swizzle"]]] for m in getattr(meta, "tensordesc_meta", ())],
    }


def read_map(type_: str) -> list[Any]:
    """Box and swizzle of a descriptor's type, ``tensordesc<i16[64, 32],64>``."""
    found = DESCRIPTOR.fullmatch(type_)
    assert found is not None, type_
    return [[int(extent) for extent in found[1].split(",")], int(found[2])]


def resources(cubin: bytes, symbol: str, folder: Path) -> tuple[int, int]:
    """Registers a thread and bytes of local memory of a kernel, as cuobjdump reads them off the cubin."""
    from triton import knobs  # type: ignore[import-untyped]

    path = folder / "kernel.cubin"
    path.write_bytes(cubin)
    command = [knobs.nvidia.cuobjdump.path, "-res-usage", str(path)]
    text = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    found = re.search(rf"Function {re.escape(symbol)}:\s*REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", text)
    if found is None:
        raise ValueError(f"cuobjdump says nothing of {symbol}: {text.strip()[:200]}")
    registers, stack, local = map(int, found.groups())
    return registers, stack + local


def explain(error: BaseException | None) -> str:
    """An error and its causes, innermost first: Triton wraps what is wrong in one error for each call it inlines."""
    parts: list[str] = []
    while error is not None:
        parts.append(f"{type(error).__name__}: {error}")
        error = error.__cause__ or error.__context__
    return "; in ".join(reversed(parts))


def main() -> None:
    """Serve jobs until standard input ends."""
    replies = sys.stdout
    sys.stdout = sys.stderr  # whatever the compiler prints is not an answer
    with TemporaryDirectory() as folder:
        for line in sys.stdin:
            try:
                answer = compile_job(json.loads(line), Path(folder))
            except Exception as error:
                answer = {"error": explain(error)}
            print(json.dumps(answer), file=replies, flush=True)


if __name__ == "__main__":
    main()
