"""One prompt for vLLM: its sampling parameters, and what comes back, as every engine here has it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from executors.inference.generation_results import ChosenToken, Sample, TokenScore
from executors.inference.generation_run import PromptRow
from executors.inference.sampling_spec import GuidedOutput, InferenceOptions

if TYPE_CHECKING:
    from vllm import CompletionOutput, RequestOutput, SamplingParams
    from vllm.sampling_params import StructuredOutputsParams

_NEWS_EVERY_TOKENS = 16


def sampling_params(row: PromptRow, options: InferenceOptions, stop_ids: Sequence[int]) -> SamplingParams:
    """Parameters of one prompt.

    Args:
        row: the prompt.
        options: of its task.
        stop_ids: tokens that end a text.

    Raises:
        vllm.exceptions.VLLMValidationError, ValueError: vLLM does not take them.
    """
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind

    return SamplingParams(
        n=options.n,
        temperature=0.0 if options.greedy else options.temperature,
        top_p=1.0 if options.greedy else options.top_p,
        top_k=0 if options.greedy or options.top_k is None else max(options.top_k, 0),
        presence_penalty=options.presence_penalty,
        frequency_penalty=options.frequency_penalty,
        repetition_penalty=options.repetition_penalty,
        seed=row.seed,
        stop=list(options.stop),
        stop_token_ids=list(stop_ids),
        max_tokens=row.new_tokens,
        logprobs=options.logprobs,
        structured_outputs=_structure(options.guided) if options.guided else None,
        output_kind=RequestOutputKind.DELTA,
        stream_interval=_NEWS_EVERY_TOKENS,
    )


def _structure(guided: GuidedOutput) -> StructuredOutputsParams:
    from vllm.sampling_params import StructuredOutputsParams

    return StructuredOutputsParams(
        json=guided.json_schema,
        json_object=guided.json_object or None,
        regex=guided.regex,
        choice=list(guided.choice) if guided.choice else None,
        grammar=guided.grammar,
    )


@dataclass
class _Growing:
    text: list[str] = field(default_factory=list)
    tokens: int = 0
    logprobs: list[ChosenToken] = field(default_factory=list)
    ended: str = ""


class Answer:
    """Puts together what vLLM sends of one prompt, bit by bit."""

    def __init__(self, options: InferenceOptions) -> None:
        self._top = options.logprobs
        self._samples = [_Growing() for _ in range(options.n)]

    def add(self, news: RequestOutput) -> int:
        """Take the newest bit; returns how many tokens it has."""
        fresh = 0
        for part in news.outputs:
            sample = self._samples[part.index]
            sample.text.append(part.text)
            sample.tokens += len(part.token_ids)
            fresh += len(part.token_ids)
            sample.ended = part.finish_reason or sample.ended
            if self._top is not None:
                sample.logprobs += _scores(part, self._top)
        return fresh

    def result(self) -> tuple[Sample, ...] | str:
        """All samples, or why there are none."""
        lost = [sample.ended for sample in self._samples if sample.ended not in {"stop", "length"}]
        if lost:
            return f"the engine ended this prompt with {lost[0] or 'no reason'!r}"
        return tuple(
            Sample(
                text="".join(sample.text),
                finish_reason="stop" if sample.ended == "stop" else "length",
                tokens=sample.tokens,
                logprobs=None if self._top is None else tuple(sample.logprobs),
            )
            for sample in self._samples
        )


def _scores(part: CompletionOutput, top: int) -> list[ChosenToken]:
    """Log probabilities of the tokens of one bit, with the `top` likeliest at each place."""
    found = []
    for token, known in zip(part.token_ids, part.logprobs or (), strict=False):
        scored = {
            number: TokenScore(id=number, token=score.decoded_token or "", logprob=score.logprob)
            for number, score in known.items()
        }
        likeliest = sorted((score.rank or 0, number) for number, score in known.items())
        best = tuple(scored[number] for rank, number in likeliest if rank <= top)[:top]
        own = scored[token]
        found.append(ChosenToken(id=own.id, token=own.token, logprob=own.logprob, top=best))
    return found
