"""`inference.guided` with Transformers: only tokens that keep the output within a grammar stay possible."""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Final

from executors.errors import BadSpecError, MissingLibraryError
from executors.inference.sampling_spec import GuidedOutput

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedTokenizerBase
    from xgrammar import CompiledGrammar

_FIELD: Final = "spec.inference.guided"
_COMPILE_SEC: Final = 60.0
_CACHE_BYTES: Final = 256 * 1024**2
_THREADS: Final = 4
_LONGEST_PROBLEM: Final = 400
_ANY_OBJECT: Final = '{"type": "object"}'

_SOURCE_LINE: Final = re.compile(r"^\[[\d:]+\] \S+:\d+: ")
_ESCAPES: Final = {ord("\\"): r"\\", ord('"'): r"\""} | {code: f"\\x{code:02x}" for code in (*range(32), 127)}


class GuideMaker:
    """Compiles grammars for one model, and keeps the latest: tasks of a kind ask for the same.

    Args:
        tokenizer: the model's.
        vocabulary: how many scores the model gives at each place; it may be more than the tokenizer has tokens.
        end_ids: tokens that end a text.

    Raises:
        BadSpecError: the model has no end token.
        MissingLibraryError: xgrammar is not installed.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, vocabulary: int, end_ids: frozenset[int]) -> None:
        try:
            import xgrammar
        except ImportError as error:
            raise MissingLibraryError(
                f"{_FIELD} needs the library xgrammar: {error}",
                hint="Install the extra on the worker: uv sync --inexact --extra inference.",
            ) from error
        if not end_ids:
            raise BadSpecError(f"{_FIELD} needs a model that can end a text, but this one has no end token")
        info = xgrammar.TokenizerInfo.from_huggingface(tokenizer, vocab_size=vocabulary, stop_token_ids=sorted(end_ids))
        self._compiler = xgrammar.GrammarCompiler(info, max_threads=_THREADS, cache_limit_bytes=_CACHE_BYTES)

    def compile(self, guided: GuidedOutput) -> CompiledGrammar:
        """Compile what a spec asks for.

        Raises:
            BadSpecError: it is no grammar, or one that takes too long.
        """
        field, compiler = guided.field, self._compiler
        if guided.json_schema is not None:
            return _compiled(field, compiler.compile_json_schema, json.dumps(guided.json_schema))
        if guided.json_object:
            return _compiled(field, compiler.compile_json_schema, _ANY_OBJECT)
        if guided.regex is not None:
            return _compiled(field, compiler.compile_regex, guided.regex)
        return _compiled(field, compiler.compile_grammar, guided.grammar or _choice_grammar(guided.choice or ()))


class Guide:
    """A logits processor for one batch; each row follows the grammar on its own.

    Args:
        grammar: for all rows.
        end_ids: tokens that end a text; possible only where the grammar is complete.
        done: which rows have ended; whoever watches the batch keeps it up to date.
        field: the spec's key, for errors.
    """

    def __init__(self, grammar: CompiledGrammar, end_ids: frozenset[int], done: Sequence[bool], field: str) -> None:
        import xgrammar

        self._done = done
        self._field = field
        self._matchers = [xgrammar.GrammarMatcher(grammar, override_stop_tokens=sorted(end_ids)) for _ in done]
        self._vocabulary = grammar.tokenizer_info.vocab_size
        self._possible = xgrammar.allocate_token_bitmask(len(done), self._vocabulary)
        self._begun = False

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Return the scores with only those tokens possible that the grammar allows next.

        Raises:
            BadSpecError: the grammar leaves nothing that the model could write.
        """
        import xgrammar

        newest = input_ids[:, -1].tolist()
        for row, matcher in enumerate(self._matchers):
            if self._done[row]:
                self._possible[row] = -1  # all bits: what comes now is padding
                continue
            if self._begun and not matcher.accept_token(newest[row]):
                raise RuntimeError(f"{self._field}: token {newest[row]} was chosen, which the grammar does not allow")
            matcher.fill_next_token_bitmask(self._possible, row)
            if not self._possible[row].any():
                raise BadSpecError(
                    f"{self._field} leaves nothing that this model could write next; "
                    "expected a grammar that its tokens can express"
                )
        self._begun = True
        xgrammar.apply_token_bitmask_inplace(scores, self._possible.to(scores.device))
        scores[:, self._vocabulary :] = float("-inf")
        return scores


def _choice_grammar(choices: Sequence[str]) -> str:
    return "root ::= " + " | ".join(f'"{choice.translate(_ESCAPES)}"' for choice in choices)


def _compiled(field: str, compile_it: Callable[[str], CompiledGrammar], source: str) -> CompiledGrammar:
    """Compile within a time limit."""
    outcome: list[Any] = []

    def work() -> None:
        try:
            outcome.append(compile_it(source))
        except Exception as error:  # noqa: BLE001 - many kinds, each about the grammar; a BadSpecError below
            outcome.append(error)

    thread = threading.Thread(target=work, name="guided", daemon=True)
    thread.start()
    thread.join(_COMPILE_SEC)
    if not outcome:
        raise BadSpecError(f"{field} takes more than {_COMPILE_SEC:.0f} s to compile; expected something simpler")
    if isinstance(outcome[0], Exception):
        problem = _SOURCE_LINE.sub("", str(outcome[0]).strip())[:_LONGEST_PROBLEM]
        raise BadSpecError(f"{field} cannot be used: {problem}") from outcome[0]
    grammar: CompiledGrammar = outcome[0]
    return grammar
