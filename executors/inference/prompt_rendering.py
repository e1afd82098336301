"""Prompts to the text and tokens that a model sees: system prompts, chat templates, the model's context."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from executors.contract import EnginePolicy, RunReport
from executors.errors import BadDataError, BadSpecError
from executors.inference.inference_spec import InferenceSpec
from executors.inference.prompt_data import Prompt, message_json, read_prompts

if TYPE_CHECKING:
    from pathlib import Path

    from transformers import PreTrainedTokenizerBase

_PROGRESS_EVERY_SEC: Final = 2.0


@dataclass(frozen=True)
class RenderedPrompt:
    """A prompt with the text and the tokens that the model sees, or with the reason why it cannot run."""

    prompt: Prompt
    text: str
    ids: tuple[int, ...]
    problem: str


@dataclass(frozen=True)
class RenderedSet:
    """All prompts of a task or of one child, in the order of its data."""

    items: tuple[RenderedPrompt, ...]
    warnings: tuple[str, ...]


class PromptRenderer:
    """Renders for one model.

    Args:
        tokenizer: the model's.
        end_ids: tokens that end a text.
        context_tokens: prompt and output together at most; None when there is no such limit.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, end_ids: frozenset[int], context_tokens: int | None) -> None:
        self.tokenizer = tokenizer
        self.end_ids = end_ids
        self.context_tokens = context_tokens

    def render_all(self, spec: InferenceSpec, policy: EnginePolicy, scratch: Path, report: RunReport) -> RenderedSet:
        """Read, render and tokenise the prompts of one spec.

        Args:
            spec: the spec of a task, or of a merged child.
            policy: see `read_prompts`.
            scratch: see `read_prompts`.
            report: hears about every two seconds how far this is.

        Raises:
            BadSpecError: a conversation for a model without a chat template; see `read_prompts` for more.
            BadDataError: no data, or no prompt that can run.
            TaskCancelledError: the daemon asked to stop.
        """
        report.raise_if_cancelled()
        found = read_prompts(spec, policy, scratch)
        system = spec.inference.system_prompt if found.with_system_prompt else ""
        items: list[RenderedPrompt] = []
        told = time.monotonic()
        for index, prompt in enumerate(found.prompts):
            report.raise_if_cancelled()
            if time.monotonic() - told >= _PROGRESS_EVERY_SEC:
                told = time.monotonic()
                report.progress(0, len(found.prompts), message=f"preparing prompts: {index} done")
            in_chat = spec.inference.chat or bool(prompt.messages)
            items.append(self._render(prompt, system, index, in_chat=in_chat))
        if all(item.problem for item in items):
            raise BadDataError(f"none of the {len(items)} prompts can run; the first: {items[0].problem}")
        failed = sum(bool(item.problem) for item in items)
        warning = f"{failed} of {len(items)} prompts could not run; their items hold an 'error'"
        return RenderedSet(tuple(items), (*found.warnings, *([warning] if failed else [])))

    def new_tokens(self, prompt: RenderedPrompt, wanted: int) -> int:
        """How many tokens a prompt may add."""
        return wanted if self.context_tokens is None else min(wanted, self.context_tokens - len(prompt.ids))

    def stop_ids(self, stop: Sequence[str]) -> frozenset[int]:
        """Return stop strings that are special tokens as ids: special tokens never show in the decoded text."""
        special = dict(zip(self.tokenizer.all_special_tokens, self.tokenizer.all_special_ids, strict=True))
        return frozenset(special[text] for text in stop if text in special)

    def decode(self, tokens: Sequence[int]) -> str:
        """Tokens as text, without special ones."""
        text: str = self.tokenizer.decode(tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return text

    def token_text(self, token: int) -> str:
        """One token as text, special ones too."""
        text: str = self.tokenizer.decode([token], clean_up_tokenization_spaces=False)
        return text

    def _render(self, prompt: Prompt, system: str, index: int, *, in_chat: bool) -> RenderedPrompt:
        if prompt.problem:
            return RenderedPrompt(prompt, "", (), prompt.problem)
        raw = f"{system}\n{prompt.text}" if system else prompt.text
        text = self._chat_text(prompt, system, index) if in_chat else raw
        try:
            text.encode()
        except UnicodeEncodeError as error:  # no tokenizer takes it, and no result could hold it
            raise BadDataError(f"prompt {index} holds half a character (a lone surrogate): {error}") from error
        ids = self._token_ids(text, special=not in_chat)
        return RenderedPrompt(prompt, text, ids, self._length_problem(ids))

    def _chat_text(self, prompt: Prompt, system: str, index: int) -> str:
        if self.tokenizer.chat_template is None:
            raise BadSpecError(
                f"prompt {index} is a conversation or spec.inference.chat is true, but the model has no chat template",
                hint="Use an instruction-tuned model, or send plain strings without spec.inference.chat.",
            )
        messages = [message_json(message) for message in prompt.messages]
        messages = messages or [{"role": "user", "content": prompt.text}]
        if system and not any(message["role"] == "system" for message in messages):
            messages.insert(0, {"role": "system", "content": system})
        try:
            text: str = self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        except MemoryError:
            raise
        except Exception as error:  # a template is a program, which may raise anything: this prompt is not for it
            raise BadDataError(
                f"prompt {index} does not fit the model's chat template: {type(error).__name__}: {error}",
                hint="Many templates want user and assistant in turns, and some know no system message.",
            ) from error
        return text

    def _token_ids(self, text: str, *, special: bool) -> tuple[int, ...]:
        return tuple(self.tokenizer(text, add_special_tokens=special, verbose=False)["input_ids"]) if text else ()

    def _length_problem(self, ids: Sequence[int]) -> str:
        if not ids:
            return "the prompt is empty; expected at least one character"
        limit = self.context_tokens
        if limit is not None and len(ids) >= limit:
            return f"the prompt has {len(ids)} tokens, expected fewer than the model's context of {limit}; shorten it"
        return ""
