"""Fills the masks of grammar states: when the first one is read, or in a thread while the executor computes."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from queue import SimpleQueue
from typing import Any

import numpy as np
import numpy.typing as npt

from llmopt.runtime.allowed import Bitmask, allows

HANDED_OVER = 4
"""Masks from which on another thread fills them beside the forward pass. One costs 50 µs, waking a thread as much."""
PARALLEL, MOST_THREADS = 16, 8
"""Masks from which on several threads fill them, and how many."""


@dataclass(slots=True)
class State:
    """An llguidance matcher, and the token it still has to consume."""

    matcher: Any
    token: int | None = None

    def catch_up(self) -> bool:
        """Consume the token; False when the grammar cannot go on."""
        token, self.token = self.token, None
        return token is None or bool(self.matcher.consume_token(token))


Fill = Callable[[], npt.NDArray[np.uint32]]
"""Makes masks (n, words)."""
Answer = npt.NDArray[np.uint32] | BaseException


class Masks(Mapping[int, Bitmask]):
    """Masks of the next token by sequence, all there when the first one is read."""

    def __init__(self, states: Mapping[int, State], fill: Fill) -> None:
        self._states, self._fill = states, fill
        self._found: dict[int, Bitmask] = {}

    def __getitem__(self, seq_id: int) -> Bitmask:
        if not self._found:
            self._read()
        return self._found[seq_id]

    def __contains__(self, seq_id: object) -> bool:
        return seq_id in self._states

    def __iter__(self) -> Iterator[int]:
        return iter(self._states)

    def __len__(self) -> int:
        return len(self._states)

    def allow(self, seq_id: int, token: int) -> bool:
        """Whether the grammar goes on with this token, as far as its mask says."""
        return seq_id in self._states and allows(self[seq_id], token)

    def _read(self) -> None:
        self._found = dict(zip(self._states, self._fill()))


class MaskFiller:
    """Lets grammar states catch up and fills their masks, ``words`` words each.

    ``ahead``: where they are many a thread does, beginning with ``start``. It is for executors that leave the host a
    core: neither they nor llguidance hold the interpreter while they compute.
    """

    def __init__(self, words: int, ahead: bool) -> None:
        self._words, self._ahead = words, ahead
        self._workers = min(MOST_THREADS, (os.cpu_count() or 1) - 1)  # asking the system took 50 us, each step
        self._buffer, self._address = np.zeros((0, words), np.uint32), 0
        self._thread: _Thread | None = None
        self._pool: Any = None

    def start(self, states: Mapping[int, State]) -> Masks:
        """Their masks; until one of those is read, nothing else may touch the states."""
        chosen = list(states.values())
        if not self._ahead or len(chosen) < HANDED_OVER:
            return Masks(states, lambda: self._fill(chosen))
        if self._thread is None:
            self._thread = _Thread()
        return Masks(states, self._thread.start(lambda: self._fill(chosen)))

    def close(self) -> None:
        """End the thread; idempotent."""
        if self._thread is not None:
            self._thread.end()
            self._thread = None

    def _fill(self, states: Sequence[State]) -> npt.NDArray[np.uint32]:
        """Masks (n, words); nothing is allowed where a grammar has failed, which ends that request and no other."""
        if len(states) > len(self._buffer):
            self._buffer = np.zeros((len(states), self._words), np.uint32)
            self._address = self._buffer.ctypes.data
        first, size = self._address, self._buffer.itemsize * self._words
        if len(states) < PARALLEL or self._workers < 2:
            for i, state in enumerate(states):
                state.catch_up()
                state.matcher.unsafe_compute_mask_ptr(first + i * size, size)
        else:
            self._fill_parallel(states, first, size)
        masks = self._buffer[: len(states)].copy()  # whoever reads them may do so after the next ones are made
        for i, state in enumerate(states):
            if state.matcher.is_error():
                masks[i] = 0
        return masks

    def _fill_parallel(self, states: Sequence[State], first: int, size: int) -> None:
        if self._pool is None:
            from llguidance import LLExecutor

            self._pool = LLExecutor(self._workers)
        behind = [(state.matcher, state.token) for state in states if state.token is not None]
        if behind:
            self._pool.consume_token_par(behind)
        for state in states:
            state.token = None
        numbered = [(state.matcher, i) for i, state in enumerate(states)]
        self._pool.unsafe_compute_mask_ptr(numbered, first, size, len(states))


class _Thread:
    """Makes masks beside its owner, one set after another."""

    def __init__(self) -> None:
        self._asked: SimpleQueue[tuple[Fill, SimpleQueue[Answer]] | None] = SimpleQueue()
        threading.Thread(target=self._run, name="masks", daemon=True).start()

    def start(self, fill: Fill) -> Fill:
        """Begin; what is returned waits for the masks and hands them over once."""
        answer: SimpleQueue[Answer] = SimpleQueue()

        def wait() -> npt.NDArray[np.uint32]:
            done = answer.get()
            if isinstance(done, BaseException):
                raise done
            return done

        self._asked.put((fill, answer))
        return wait

    def end(self) -> None:
        self._asked.put(None)

    def _run(self) -> None:
        while (asked := self._asked.get()) is not None:
            fill, answer = asked
            try:
                answer.put(fill())
            except BaseException as error:
                answer.put(error)
