"""Token sampling on the host: the executors that have no device sampler use it."""

from __future__ import annotations

import secrets
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from llmopt.errors import ExecutorError
from llmopt.runtime.allowed import AllowedTokens, Bitmask, allows
from llmopt.runtime.philox import uniforms
from llmopt.runtime.protocol import NO_TOKEN, Admission, FloatArray, IntArray, Sampled, SamplingParams


@dataclass(slots=True)
class _Row:
    """Sampling state of one sequence. ``position``: of the token to draw next."""

    params: SamplingParams
    seed: int
    position: int
    last: int
    plain: bool
    prompt: IntArray
    counts: Counter[int] = field(default_factory=Counter)

    def push(self, token: int) -> None:
        self.position += 1
        self.last = token
        if not self.plain:
            self.counts[token] += 1


class HostSampler:
    """Draws next tokens from logits, row by row, keeping the little state a sequence needs.

    The order is: penalties, logit bias, grammar mask, temperature, top-k, top-p of what top-k left, min-p.
    Ties go to the lowest token id. Log-probabilities are those of the model itself: log-softmax of the
    logits as they arrive, before any of the above.
    """

    def __init__(self, vocab_size: int) -> None:
        self.vocab_size = vocab_size
        self._rows: dict[int, _Row] = {}
        self._allowed = AllowedTokens(vocab_size)

    def admit(self, admission: Admission) -> None:
        """Start a sequence, or resume one whose ``output`` was drawn before."""
        params, output = admission.sampling, admission.output
        history = output if len(output) else admission.prompt
        self._rows[admission.seq_id] = _Row(
            params=params,
            seed=secrets.randbits(64) if params.seed is None else params.seed & (2**64 - 1),
            position=len(admission.prompt) + len(output),
            last=int(history[-1]),
            plain=_is_plain(params),
            prompt=np.unique(admission.prompt) if params.repetition_penalty != 1 else np.zeros(0, np.int64),
            counts=Counter(output.tolist()),
        )

    def release(self, seq_id: int) -> None:
        """Forget a sequence."""
        del self._rows[seq_id]

    def last(self, seq_id: int) -> int:
        """The sequence's last token: the last one drawn, or the end of its prompt."""
        return self._rows[seq_id].last

    def sample_rows(
        self, seq_ids: Sequence[int], logits: FloatArray, masks: Mapping[int, Bitmask] | None = None
    ) -> list[Sampled]:
        """Draw one token for each sequence from ``logits`` (n, V) float32, in order.

        ``masks``: grammar bitmask by sequence, (ceil(V/32),) uint32, bit set = allowed. A row that may draw nothing
        gets NO_TOKEN, and its sequence stays as it is. Raises ExecutorError when a row holds NaN or has no finite
        maximum.
        """
        rows = [self._rows[seq_id] for seq_id in seq_ids]
        best = logits.argmax(axis=1)
        if not np.isfinite(logits[np.arange(len(rows)), best]).all():
            raise ExecutorError("the model produced logits that are not finite")
        found = [masks.get(seq_id) for seq_id in seq_ids] if masks else [None] * len(rows)
        draws = _draws(rows)
        sampled = []
        for i, (row, token, mask) in enumerate(zip(rows, best.tolist(), found, strict=True)):
            if row.plain:
                if mask is not None and not allows(mask, token):
                    token = self._allowed.of(mask).best(logits[i])
                result = Sampled(token)
            else:
                result = self._sample(row, logits[i], mask, draws.get(i, 0.0))
            if result.token != NO_TOKEN:
                row.push(result.token)
            sampled.append(result)
        return sampled

    def _sample(self, row: _Row, logits: FloatArray, mask: Bitmask | None, uniform: float) -> Sampled:
        """What a row that is more than an argmax draws from its logits (V,)."""
        edited = _edit(row, logits)
        if mask is not None:
            edited = self._allowed.of(mask).only(edited)
        if edited.max() == -np.inf:
            return Sampled(NO_TOKEN)
        return report(logits, _draw(edited, row.params, uniform), row.params.logprobs)


def _is_plain(params: SamplingParams) -> bool:
    """Whether a row is nothing but an argmax."""
    off = (params.repetition_penalty, params.presence_penalty, params.frequency_penalty) == (1, 0, 0)
    return params.temperature == 0 and off and not params.logit_bias and params.logprobs is None


def _draws(rows: Sequence[_Row]) -> dict[int, float]:
    """A uniform number for every row that is not greedy, by index."""
    random = [i for i, row in enumerate(rows) if row.params.temperature > 0]
    if not random:
        return {}
    values = uniforms([rows[i].seed for i in random], [rows[i].position for i in random])
    return dict(zip(random, values.tolist(), strict=True))


def _edit(row: _Row, logits: FloatArray) -> FloatArray:
    """A copy of the logits (V,) with penalties and bias applied."""
    x, params = logits.astype(np.float32), row.params
    if row.counts or len(row.prompt):
        _penalize(x, row)
    for token, bias in params.logit_bias.items():
        x[token] += bias
    return x


def _penalize(x: FloatArray, row: _Row) -> None:
    """Repetition penalty on prompt and output, presence and frequency penalties on the output, in place."""
    params = row.params
    ids = np.fromiter(row.counts.keys(), np.int64, len(row.counts))
    if params.repetition_penalty != 1:
        seen = np.union1d(ids, row.prompt)
        x[seen] = np.where(x[seen] > 0, x[seen] / params.repetition_penalty, x[seen] * params.repetition_penalty)
    counts = np.fromiter(row.counts.values(), np.float32, len(row.counts))
    x[ids] -= params.frequency_penalty * counts + params.presence_penalty


def _draw(x: FloatArray, params: SamplingParams, uniform: float) -> int:
    """Token id drawn from edited logits (V,): inverse of the cumulative distribution in order of token id."""
    if params.temperature == 0:
        return int(x.argmax())
    ids = top_ids(x, params.top_k) if 0 < params.top_k < len(x) else np.flatnonzero(x > -np.inf)
    scaled = (x[ids].astype(np.float64) - x.max()) / params.temperature
    weights = np.exp(scaled)
    keep = np.ones(len(ids), dtype=bool)
    if params.top_p < 1:
        keep &= _nucleus(weights, params.top_p)
    if params.min_p > 0:
        keep &= weights >= params.min_p
    ids, cumulative = ids[keep], np.cumsum(weights[keep])
    index = int(np.searchsorted(cumulative, uniform * cumulative[-1], side="right"))
    return int(ids[min(index, len(ids) - 1)])


def top_ids(x: FloatArray, k: int) -> IntArray:
    """Ids of the ``k`` largest values of ``x`` (V,), ascending by id; among equals the lowest ids win."""
    threshold = np.partition(x, len(x) - k)[len(x) - k]
    above = np.flatnonzero(x > threshold)
    equal = np.flatnonzero(x == threshold)[: k - len(above)]
    return np.sort(np.concatenate((above, equal)))


def _nucleus(weights: npt.NDArray[np.float64], top_p: float) -> npt.NDArray[np.bool_]:
    """The smallest set of the heaviest entries whose share of the mass reaches ``top_p``.

    Only entries above (1 - top_p) / 2n of the mass are sorted: all others together weigh less than 1 - top_p,
    so none of them can belong. On peaked distributions this saves sorting the whole vocabulary.
    """
    total = weights.sum()
    heavy = np.flatnonzero(weights >= total * (1 - top_p) / (2 * len(weights)))
    order = heavy[np.argsort(-weights[heavy], kind="stable")]
    before = np.cumsum(weights[order]) - weights[order]
    keep = np.zeros(len(weights), dtype=bool)
    keep[order[before < top_p * total]] = True
    keep[order[0]] = True
    return keep


def report(logits: FloatArray, token: int, alternatives: int | None) -> Sampled:
    """The drawn token with the log-probabilities asked for."""
    if alternatives is None:
        return Sampled(token)
    peak = float(logits.max())
    norm = peak + float(np.log(np.exp(logits - peak).sum(dtype=np.float64)))
    ids = top_ids(logits, min(alternatives, len(logits))) if alternatives else np.zeros(0, np.int64)
    best = sorted(ids.tolist(), key=lambda i: (-float(logits[i]), i))
    return Sampled(token, float(logits[token]) - norm, tuple((i, float(logits[i]) - norm) for i in best))
