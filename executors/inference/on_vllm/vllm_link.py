"""vLLM's asynchronous engine on an event loop in a thread of its own, for callers in other threads."""

from __future__ import annotations

import asyncio
import itertools
import queue
import threading
from collections.abc import Callable, Coroutine, Iterator, Mapping, Sequence
from concurrent.futures import wait
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, TypeVar

from executors.inference.generation_results import Sample
from executors.inference.generation_run import PromptRow
from executors.inference.on_vllm.vllm_requests import Answer
from executors.inference.sampling_spec import InferenceOptions

if TYPE_CHECKING:
    from vllm import SamplingParams
    from vllm.lora.request import LoRARequest
    from vllm.v1.engine.async_llm import AsyncLLM

_LOOK_EVERY_SEC: Final = 0.2
_CLOSE_SEC: Final = 5.0

T = TypeVar("T")


@dataclass(frozen=True)
class Request:
    """How one prompt is to be run."""

    params: SamplingParams
    adapter: LoRARequest | None


@dataclass(frozen=True)
class Finished:
    """One prompt's outcome: its outputs, why it has none, or what vLLM raised."""

    row: PromptRow
    outcome: tuple[Sample, ...] | str | Exception


@dataclass
class Tokens:
    """Tokens generated since somebody looked."""

    fresh: int = 0

    def take(self) -> int:
        """Return the count and begin anew."""
        fresh, self.fresh = self.fresh, 0
        return fresh


class VllmLink:
    """A running engine. Its methods may be called from any thread but its own.

    Args:
        arguments: keyword arguments for vLLM's `AsyncEngineArgs`.

    Raises:
        Exception: whatever vLLM raises when it cannot start.
    """

    def __init__(self, arguments: Mapping[str, object]) -> None:
        self._numbers = itertools.count(1)
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._serve, name="vllm", daemon=True)
        self._thread.start()
        try:
            self._llm = self._call(_start(arguments))
        except BaseException:
            self._loop.call_soon_threadsafe(self._loop.stop)
            raise
        config = self._llm.model_config
        self.context_tokens: int = config.max_model_len
        self.dtype = str(config.dtype).removeprefix("torch.")
        self.most_sequences: int = self._llm.scheduler_config.max_num_seqs

    @property
    def alive(self) -> bool:
        """Whether it can still run anything."""
        return not self._llm.errored

    def add_adapter(self, adapter: LoRARequest, check: Callable[[], None]) -> None:
        """Load an adapter now, so that a faulty one is noticed before anything runs with it.

        Args:
            adapter: the adapter.
            check: called several times a second; what it raises ends the wait.

        Raises:
            Exception: whatever vLLM raises.
        """
        loading = asyncio.run_coroutine_threadsafe(self._llm.add_lora(adapter), self._loop)
        while not loading.done():
            wait([loading], _LOOK_EVERY_SEC)
            check()
            if not self.alive:  # vLLM leaves such calls unanswered when its processes end
                loading.cancel()
                raise self._llm.dead_error
        loading.result()

    def run(
        self,
        rows: Sequence[PromptRow],
        request_of: Callable[[PromptRow], Request],
        options: InferenceOptions,
        tokens: Tokens,
    ) -> Iterator[Finished | None]:
        """Run prompts beside whatever else runs.

        Args:
            rows: the prompts.
            request_of: makes a prompt's request once there is room for it; what it raises is that prompt's outcome.
            options: of all of them.
            tokens: counts what is generated.

        Yields:
            What is finished, in the order in which it is; None several times a second, for the caller to look around.
            A caller that stops asking ends what still runs.
        """
        results: queue.SimpleQueue[Finished] = queue.SimpleQueue()
        work = self._feed(rows, lambda row: self._one(row, request_of, options, tokens), results)
        feeding = asyncio.run_coroutine_threadsafe(work, self._loop)
        try:
            while not (feeding.done() and results.empty()):
                try:
                    yield results.get(timeout=_LOOK_EVERY_SEC)
                except queue.Empty:
                    yield None
            feeding.result()
        finally:
            feeding.cancel()  # aborts the requests that still run

    def close(self) -> None:
        """End the engine and its processes."""
        self._llm.shutdown()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(_CLOSE_SEC)

    def _serve(self) -> None:
        self._loop.run_forever()
        self._loop.close()

    async def _feed(
        self,
        rows: Sequence[PromptRow],
        answer: Callable[[PromptRow], Coroutine[None, None, Finished]],
        results: queue.SimpleQueue[Finished],
    ) -> None:
        waiting = iter(rows)

        async def take() -> None:
            for row in waiting:
                results.put(await answer(row))

        # Twice what fits into a step: the next ones wait in the engine, and its queue never runs dry.
        async with asyncio.TaskGroup() as group:
            for _ in range(min(len(rows), 2 * self.most_sequences)):
                group.create_task(take())

    async def _one(
        self,
        row: PromptRow,
        request_of: Callable[[PromptRow], Request],
        options: InferenceOptions,
        tokens: Tokens,
    ) -> Finished:
        from vllm.inputs.engine import tokens_input

        answer = Answer(options)
        try:
            request = request_of(row)
            prompt = tokens_input(list(row.ids))
            name = f"prompt-{next(self._numbers)}"
            async for news in self._llm.generate(prompt, request.params, name, lora_request=request.adapter):
                tokens.fresh += answer.add(news)
        except Exception as error:  # noqa: BLE001 - it is the outcome, and the caller judges it
            return Finished(row, error)
        return Finished(row, answer.result())

    def _call(self, work: Coroutine[None, None, T]) -> T:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result()


async def _start(arguments: Mapping[str, object]) -> AsyncLLM:
    from vllm import AsyncEngineArgs
    from vllm.usage.usage_lib import UsageContext
    from vllm.v1.engine.async_llm import AsyncLLM

    # Batch limits for throughput, as `vllm.LLM` has them; those of a server would favour latency.
    return AsyncLLM.from_engine_args(AsyncEngineArgs(**arguments), usage_context=UsageContext.LLM_CLASS)
