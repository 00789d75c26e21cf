"""An engine process over the fake executor: ``fake_engine.py FD OPTIONS`` with OPTIONS as JSON.

``sleep``: seconds a step takes; ``load_sleep``: seconds loading takes; ``fail_at``: step at which the executor fails;
``queue``: bounds of the queue; ``load_error``: message of an ArtifactError raised at load; ``eos``: ids of
end-of-sequence tokens; ``dead_end``: [token, length], a sequence whose prompt begins with the token may draw nothing
once it is that long.
"""

import json
import sys
import time

import numpy as np

from llmopt.errors import ArtifactError
from llmopt.runtime.core import EngineCore
from llmopt.runtime.fairness import QueueOptions
from llmopt.runtime.options import SchedulerOptions
from llmopt.runtime.protocol import NO_TOKEN, ExecutorLimits, Sampled, StepOutput
from llmopt.serve.engine_process import run_engine
from tests.runtime.fake import FakeExecutor, plan_of

VOCAB, CONTEXT = 4096, 96
PLAN = plan_of("paged", context=CONTEXT)


def prompt_logits(tokens):
    """Logits (rows, VOCAB) after each token of a prompt: the next id is three times as likely as any other."""
    logits = np.zeros((len(tokens), VOCAB), np.float32)
    logits[np.arange(len(tokens)), (tokens + 1) % VOCAB] = np.log(3)
    return logits


def load(options):
    """The core, or the error asked for."""
    time.sleep(options.get("load_sleep", 0))
    if "load_error" in options:
        raise ArtifactError(options["load_error"], where="manifest.json")
    limits = ExecutorLimits(CONTEXT, 8, 64, {"paged0": 120}, VOCAB)

    token, length = options.get("dead_end", (-1, 0))

    class Slow(FakeExecutor):
        ending = frozenset()

        def _run(self, batch):
            self.ending |= {a.seq_id for a in batch.admit if a.prompt[0] == token}
            if batch.rows or batch.decode is not None:
                time.sleep(options.get("sleep", 0))
            done = super()._run(batch)
            rows = batch.all_rows(self.state_plan)
            ends = {r.seq_id for r in rows if r.seq_id in self.ending and r.start + r.query_len >= length}
            return StepOutput(
                {**done.sampled, **dict.fromkeys(ends, Sampled(NO_TOKEN))},
                {r.seq_id: prompt_logits(r.tokens) for r in batch.rows if r.logits == "all"},
            )

    scheduler = SchedulerOptions(queue=QueueOptions(**options.get("queue", {})))
    return EngineCore(Slow(PLAN, limits, options.get("fail_at")), options.get("eos", ()), options=scheduler)


if __name__ == "__main__":
    raw = json.loads(sys.argv[2])
    sys.exit(run_engine(int(sys.argv[1]), lambda: load(raw)))
