"""Compiles specializations to cubins in parallel worker processes, through the cache."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from importlib import metadata
from pathlib import Path
from queue import SimpleQueue
from tempfile import TemporaryDirectory
from typing import IO, Any

from llmopt.errors import ResourceError, TargetError

from .cache import Compiled, CubinCache, Job
from .kernel import Specialization
from .nvrtc import nvrtc_version

Progress = Callable[[str, int, int], None]


def compiler_version() -> str:
    """Triton's version; raises ResourceError when it isn't installed."""
    try:
        return metadata.version("triton")
    except metadata.PackageNotFoundError as error:
        hint = "pip install 'llmopt[compile]' (Linux; no GPU is needed)"
        raise ResourceError("target cuda compiles with triton, which is not installed", hint=hint) from error


def toolkit_major(archs: Iterable[int], specializations: Iterable[Specialization]) -> int:
    """Major CUDA version that the driver must support: of the assembler Triton uses for these archs, and of NVRTC where
    kernels are CUDA C++."""
    from triton import knobs  # type: ignore[import-untyped]

    tools = [knobs.nvidia.ptxas_blackwell if arch >= 100 else knobs.nvidia.ptxas for arch in archs]
    versions = [tool.version for tool in tools] + [nvrtc_version() for spec in specializations if spec.source]
    return max(int(version.partition(".")[0]) for version in versions)


def environment(folder: str) -> dict[str, str]:
    """A worker's: this process's imports, no interpreter mode, a private Triton cache, no source paths in cubins."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith("TRITON_")}
    return {
        **kept,
        "PYTHONPATH": os.pathsep.join(p or os.getcwd() for p in sys.path),
        "TRITON_CACHE_DIR": folder,
        "TRITON_DISABLE_LINE_INFO": "1",
        "TRITON_DEFAULT_FP_FUSION": "1",
        "OMP_NUM_THREADS": "1",
        "PYTHONHASHSEED": "0",
    }


class Worker:
    """A worker process; ``compile`` sends one job and waits. ``folder`` is private to it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        self.errors = (folder / "stderr").open("w+b")
        self.process = subprocess.Popen(
            [sys.executable, "-m", f"{__package__}.worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.errors,
            text=True,
            env=environment(str(folder / "triton")),
        )

    def compile(self, job: Job) -> Compiled:
        """The cubin of a job; raises TargetError with the compiler's words."""
        requests, replies = pipes(self.process)
        out = self.folder / "out.cubin"
        request = {**asdict(job.specialization), "arch": job.arch, "out": str(out)}
        try:
            requests.write(json.dumps(request) + "\n")
            requests.flush()
            line = replies.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            self.errors.seek(0)
            words = self.errors.read()[-2000:].decode("utf-8", "replace")
            raise TargetError(f"the compile worker died: {words}", where=job.label)
        answer: dict[str, Any] = json.loads(line)
        if "error" in answer:
            raise TargetError(f"the compiler refused the kernel: {answer['error'][:2000]}", where=job.label)
        maps = tuple((tuple(box), swizzle) for box, swizzle in answer.pop("tensor_maps"))
        return Compiled(out.read_bytes(), **answer, tensor_maps=maps)

    def close(self) -> None:
        """End the process."""
        requests, replies = pipes(self.process)
        requests.close()
        replies.close()
        self.process.wait()
        self.errors.close()


def pipes(process: subprocess.Popen[str]) -> tuple[IO[str], IO[str]]:
    """Standard input and output of a worker."""
    assert process.stdin is not None
    assert process.stdout is not None
    return process.stdin, process.stdout


def compile_all(jobs: Iterable[Job], cubins: CubinCache, progress: Progress, workers: int = 0) -> dict[Job, Compiled]:
    """Every job's cubin, from the cache or compiled now by ``workers`` processes (0: one a core)."""
    jobs = list(dict.fromkeys(jobs))
    done = {job: hit for job in jobs if (hit := cubins.get(job)) is not None}
    missing = [job for job in jobs if job not in done]
    if not missing:
        return done
    count = min(len(missing), workers or len(os.sched_getaffinity(0)))
    idle: SimpleQueue[Worker] = SimpleQueue()

    def run(job: Job) -> Compiled:
        worker = idle.get()
        try:
            return worker.compile(job)
        finally:
            idle.put(worker)

    with TemporaryDirectory(prefix="llmopt-cuda-") as folder:
        crew = [Worker(Path(folder) / str(i)) for i in range(count)]
        for worker in crew:
            idle.put(worker)
        try:
            with ThreadPoolExecutor(count) as pool:
                futures = {job: pool.submit(run, job) for job in missing}
                try:
                    for number, (job, future) in enumerate(futures.items()):
                        done[job] = future.result()
                        cubins.put(job, done[job])
                        progress("compiling kernels", number + 1, len(missing))
                except BaseException:
                    pool.shutdown(cancel_futures=True)
                    raise
        finally:
            for worker in crew:
                worker.close()
    return done
