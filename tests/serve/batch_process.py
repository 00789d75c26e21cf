"""A run over a file with the fake executor: ``batch_process.py MODEL_DIR INPUT OUTPUT LOG SLEEP``.

Every request that is begun adds its prompt to LOG; a step takes SLEEP seconds.
"""

import asyncio
import sys
import time
from pathlib import Path

from llmopt.runtime.core import EngineCore
from llmopt.runtime.protocol import ExecutorLimits
from llmopt.runtime.tokenizer import Tokenizer
from llmopt.serve.batch import BatchRunner, checked, run_to_file
from llmopt.serve.jobs import JobFile
from tests.runtime.fake import FakeExecutor, plan_of

LIMITS = ExecutorLimits(96, 4, 64, {"paged0": 120}, 4096)


def answer_file(model, source, output, log=None, sleep=0.0, name="run"):
    """Answer a file; returns (requests resumed, requests refused)."""
    tokenizer = Tokenizer.load(model / "tokenizer.json", model / "tokenizer_config.json")

    class Slow(FakeExecutor):
        def _run(self, batch):
            for row in batch.rows:
                if log is not None and row.start == 0:
                    log.write(f"{row.tokens[:3]}\n")
            time.sleep(sleep)
            return super()._run(batch)

    core = EngineCore(Slow(plan_of("paged", context=96), LIMITS))
    runner = BatchRunner(core, tokenizer, None, "fake")
    jobs = JobFile(source, {"max_tokens": 4, "temperature": 0})
    checked(jobs, runner)
    return asyncio.run(run_to_file(runner, jobs, output, {"name": name}, lambda done, total: None))


if __name__ == "__main__":
    model, source, output, log = map(Path, sys.argv[1:5])
    with log.open("a", buffering=1) as begun:
        print("ready", flush=True)
        answer_file(model, source, output, begun, float(sys.argv[5]))
