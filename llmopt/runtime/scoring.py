"""Log-probabilities of prompt tokens, gathered from the logits of prompt chunks as they are computed."""

from __future__ import annotations

from dataclasses import dataclass, field

from llmopt.runtime.protocol import FloatArray, IntArray, Sampled
from llmopt.runtime.sampler import report


@dataclass(slots=True)
class PromptScores:
    """What is known of one prompt (T,). ``alternatives``: the number reported beside each token."""

    prompt: IntArray
    alternatives: int
    found: dict[int, Sampled] = field(default_factory=dict)

    def take(self, start: int, logits: FloatArray) -> None:
        """Logits (rows, V) of the rows at positions ``start``, ``start + 1``, … (again after a preemption)."""
        for position, row in enumerate(logits, start + 1):
            if position < len(self.prompt):
                self.found[position] = report(row, int(self.prompt[position]), self.alternatives)

    def whole(self) -> tuple[Sampled, ...]:
        """One entry for each token of the prompt; the first has no log-probability, as nothing comes before it."""
        return Sampled(int(self.prompt[0])), *(self.found[i] for i in range(1, len(self.prompt)))
