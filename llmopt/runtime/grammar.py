"""Grammars: which tokens may come next, so that a text cannot leave the form it was asked to have (llguidance)."""

from __future__ import annotations

import os
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib.util import find_spec
from typing import Any

import numpy as np
import numpy.typing as npt

from llmopt.errors import RequestError, ResourceError
from llmopt.runtime.params import Grammar
from llmopt.runtime.tokenizer import Tokenizer

Bitmask = npt.NDArray[np.uint32]

MAX_SOURCE = 1 << 20
"""Characters of a grammar."""
KEPT = 256
"""Compiled grammars kept for the next request that asks for the same."""
ALL = np.uint32(2**32 - 1)
PARALLEL, MOST_THREADS = 16, 8
"""Masks from which on several threads fill them, and how many."""
COMPILE_FUEL = 10_000_000
"""llguidance's measure of the work a grammar may cause when it is compiled: about 0.2 s."""


class GrammarCompiler:
    """Compiles grammars for one tokenizer; thread-safe.

    ``vocab_size``: of the model (a tokenizer may know fewer ids). ``eos_token_ids``: what a finished text is
    followed by. Raises ResourceError without llguidance, RequestError for a model without an end-of-sequence id.
    """

    def __init__(self, tokenizer: Tokenizer, vocab_size: int, eos_token_ids: Sequence[int]) -> None:
        self.vocab_size, self.words = vocab_size, -(-vocab_size // 32)
        self._source, self._eos = tokenizer, tuple(eos_token_ids)
        self._lock = threading.Lock()
        self._tokens: Any = None
        self._known: OrderedDict[Grammar, Any] = OrderedDict()

    def compile(self, grammar: Grammar) -> Any:
        """A fresh llguidance matcher. Raises RequestError when the grammar is invalid or too large."""
        if len(grammar.source) > MAX_SOURCE:
            raise RequestError(f"the grammar has {len(grammar.source)} characters", hint=f"at most {MAX_SOURCE}")
        with self._lock:
            found = self._known.get(grammar)
            if found is not None:
                self._known.move_to_end(grammar)
                return found.deep_copy()
            tokens = self._tokenizer()
        matcher = _matcher(grammar, tokens)
        with self._lock:
            self._known[grammar] = matcher
            while len(self._known) > KEPT:
                self._known.popitem(last=False)
        return matcher.deep_copy()

    def knows(self, grammar: Grammar) -> bool:
        """Whether compiling it again costs nothing."""
        with self._lock:
            return grammar in self._known

    def _tokenizer(self) -> Any:
        """llguidance's form of the vocabulary: made at the first use (about a second for 128k tokens)."""
        if self._tokens is None:
            if find_spec("llguidance") is None:
                raise ResourceError("constrained output needs llguidance", hint="pip install 'llmopt[serve]'")
            if not self._eos:
                raise RequestError("this model has no end-of-sequence token, which constrained output needs")
            from llguidance import LLTokenizer

            source = self._source.backend.to_str()
            self._tokens = LLTokenizer(source, n_vocab=self.vocab_size, eos_token=list(self._eos))
        return self._tokens


def _matcher(grammar: Grammar, tokens: Any) -> Any:
    from llguidance import LLMatcher, LLParserLimits, grammar_from

    try:
        if grammar.kind == "json_schema":
            compiled = LLMatcher.grammar_from_json_schema(grammar.source)
        elif grammar.kind == "regex":
            compiled = LLMatcher.grammar_from_regex(grammar.source)
        else:
            compiled = grammar_from("grammar", grammar.source)
        limits = LLParserLimits(initial_lexer_fuel=COMPILE_FUEL, verbose_errors=False)
        matcher = LLMatcher(tokens, compiled, log_level=0, limits=limits)
    except ValueError as error:
        raise RequestError(f"invalid {_NAMES[grammar.kind]}: {error}") from error
    except BaseException as error:
        if type(error).__name__ == "PanicException":  # Rust's, which is no Exception
            raise RequestError(f"invalid {_NAMES[grammar.kind]}: llguidance cannot handle it") from error
        raise
    if matcher.is_error():
        raise RequestError(f"invalid {_NAMES[grammar.kind]}: {matcher.get_error()}")
    return matcher


_NAMES = {"json_schema": "JSON schema", "regex": "regular expression", "lark": "grammar"}


class Constraints:
    """Grammar states of the sequences under way."""

    def __init__(self, compiler: GrammarCompiler | None) -> None:
        self.compiler = compiler
        self._matchers: dict[int, Any] = {}
        self._threads: Any = None

    def __contains__(self, seq_id: int) -> bool:
        return seq_id in self._matchers

    def add(self, seq_id: int, grammar: Grammar) -> None:
        """Constrain a sequence; raises RequestError for a bad grammar, or where there is no tokenizer."""
        if self.compiler is None:
            raise RequestError("this engine has no tokenizer: it cannot constrain its output")
        self._matchers[seq_id] = self.compiler.compile(grammar)

    def accept(self, seq_id: int, token: int) -> RequestError | None:
        """A token was drawn; the reason when the sequence cannot go on (its grammar needs more work than allowed)."""
        matcher = self._matchers.get(seq_id)
        if matcher is None or matcher.consume_token(token):
            return None
        return RequestError(f"the grammar cannot go on after token {token}: {matcher.get_error()}")

    def forget(self, seq_id: int) -> None:
        """The sequence has ended; one without a grammar is fine."""
        self._matchers.pop(seq_id, None)

    def masks(self, seq_ids: Sequence[int]) -> Mapping[int, Bitmask]:
        """Masks of the next token of those sequences that have a grammar, all filled when the first one is read.

        An executor reads them once its forward pass runs: filling them takes host time while the device works.
        """
        chosen = {seq_id: self._matchers[seq_id] for seq_id in seq_ids if seq_id in self._matchers}
        return _Masks(chosen, self._fill) if chosen else {}

    def _fill(self, matchers: Sequence[Any]) -> npt.NDArray[np.uint32]:
        """Masks (n, words), by several threads when there are many."""
        assert self.compiler is not None
        masks = np.zeros((len(matchers), self.compiler.words), np.uint32)
        workers = min(MOST_THREADS, (os.cpu_count() or 1) - 1)
        if len(matchers) < PARALLEL or workers < 2:
            first, size = masks.ctypes.data, masks[0].nbytes
            for i, matcher in enumerate(matchers):
                matcher.unsafe_compute_mask_ptr(first + i * size, size)
        else:
            if self._threads is None:
                from llguidance import LLExecutor

                self._threads = LLExecutor(workers)
            numbered = list(zip(matchers, range(len(matchers))))
            self._threads.unsafe_compute_mask_ptr(numbered, masks.ctypes.data, masks[0].nbytes, len(matchers))
        filled: list[bool] = np.any(masks, axis=1).tolist()
        for matcher, mask, some in zip(matchers, masks, filled):
            if not some or matcher.is_error():
                mask[:] = ALL  # the token drawn will not be accepted, which ends this request and no other
        return masks


class _Masks(Mapping[int, Bitmask]):
    """Masks that are filled when one is needed."""

    def __init__(self, matchers: dict[int, Any], fill: Callable[[Sequence[Any]], npt.NDArray[np.uint32]]) -> None:
        self._matchers, self._fill = matchers, fill
        self._filled: dict[int, Bitmask] = {}

    def __getitem__(self, seq_id: int) -> Bitmask:
        if not self._filled:
            self._filled = dict(zip(self._matchers, self._fill(list(self._matchers.values()))))
        return self._filled[seq_id]

    def __contains__(self, seq_id: object) -> bool:
        return seq_id in self._matchers

    def __iter__(self) -> Iterator[int]:
        return iter(self._matchers)

    def __len__(self) -> int:
        return len(self._matchers)
