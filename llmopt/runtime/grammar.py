"""Grammars: which tokens may come next, so that a text cannot leave the form it was asked to have (llguidance)."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from typing import Any

from llmopt.errors import RequestError, ResourceError
from llmopt.runtime.allowed import Bitmask
from llmopt.runtime.masks import MaskFiller, Masks, State
from llmopt.runtime.params import Grammar
from llmopt.runtime.protocol import NO_TOKEN
from llmopt.runtime.tokenizer import Tokenizer

MAX_SOURCE = 1 << 20
"""Characters of a grammar."""
KEPT = 256
"""Compiled grammars kept for the next request that asks for the same."""
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
    """Grammar states of the sequences under way. ``ahead``: whether a thread of its own may fill their masks."""

    def __init__(self, compiler: GrammarCompiler | None, ahead: bool = False) -> None:
        self.compiler, self._ahead = compiler, ahead
        self._states: dict[int, State] = {}
        self._filler: MaskFiller | None = None
        self._masks: Masks | None = None

    def add(self, seq_id: int, grammar: Grammar) -> None:
        """Constrain a sequence; raises RequestError for a bad grammar, or where there is no tokenizer."""
        if self.compiler is None:
            raise RequestError("this engine has no tokenizer: it cannot constrain its output")
        self._states[seq_id] = State(self.compiler.compile(grammar))

    def accept(self, tokens: Mapping[int, int]) -> Mapping[int, RequestError]:
        """Tokens were drawn; the reasons of those sequences that cannot go on.

        A token that the mask allowed is consumed before the next mask. Should that take more work than a grammar may
        cause, or should a mask, it is the next token that the sequence cannot draw.
        """
        refused = {}
        for seq_id, token in tokens.items():
            if (state := self._states.get(seq_id)) is None:
                continue
            if token == NO_TOKEN:
                if reason := state.matcher.get_error():
                    refused[seq_id] = RequestError(f"the grammar cannot go on: {reason}")
            elif self._masks is not None and self._masks.allow(seq_id, token):
                state.token = token
            elif not (state.catch_up() and state.matcher.consume_token(token)):
                reason = state.matcher.get_error()
                refused[seq_id] = RequestError(f"the grammar cannot go on after token {token}: {reason}")
        return refused

    def forget(self, seq_id: int) -> None:
        """The sequence has ended; one without a grammar is fine."""
        self._states.pop(seq_id, None)

    def masks(self, seq_ids: Sequence[int]) -> Mapping[int, Bitmask]:
        """Masks of the next token of those sequences that have a grammar.

        An executor reads them once its forward pass runs: filling them takes host time while the device works.
        """
        chosen = {seq_id: self._states[seq_id] for seq_id in seq_ids if seq_id in self._states}
        if not chosen:
            return {}
        if self._filler is None:
            assert self.compiler is not None
            self._filler = MaskFiller(self.compiler.words, self._ahead)
        self._masks = self._filler.start(chosen)
        return self._masks

    def close(self) -> None:
        """End the thread, if there is one; idempotent."""
        if self._filler is not None:
            self._filler.close()
