"""Whether two engines say the same: results of text generation, compared token by token.

Two ways to compute the same model differ by rounding, and so do two batches of different sizes in one engine. A greedy
output must therefore be the same up to the first place at which the two likeliest tokens are nearly tied.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

Json = dict[str, Any]


def shape(value: object) -> object:
    """All keys of a result at every depth, and the kinds of its values; like entries of a list count once."""
    if isinstance(value, dict):
        return {key: shape(item) for key, item in value.items()}
    if isinstance(value, list):
        return sorted({repr(shape(item)) for item in value})
    return "number" if isinstance(value, int | float) and not isinstance(value, bool) else type(value).__name__


def differences(one: Sequence[Json], other: Sequence[Json], *, near: float) -> list[str]:
    """What differs between the items of two results, in sentences.

    Args:
        one: items of a greedy task with `inference.logprobs` of at least 2; without, outputs must be the same.
        other: those of the other run.
        near: log probabilities (natural) that are at most this far apart count as the same. Outputs may part at a place
            where that is true of the two likeliest tokens in both runs; what follows there is not compared.
    """
    found = [] if len(one) == len(other) else [f"{len(one)} items, and {len(other)}"]
    for item, twin in zip(one, other, strict=False):
        where = f"item {item['index']}"
        found += [f"{where}: {key} {item[key]!r}, and {twin[key]!r}" for key in _facts(item, twin)]
        problem, parted = _compare(item.get("logprobs", ()), twin.get("logprobs", ()), near)
        found += [f"{where}: {problem}"] if problem else []
        if not parted:
            found += [
                f"{where}: {key} {item[key]!r}, and {twin[key]!r}"
                for key in ("output", "finish_reason")
                if item[key] != twin[key]
            ]
    return found


def _facts(item: Json, twin: Json) -> list[str]:
    return [key for key in ("index", "prompt", "metadata") if item[key] != twin[key]]


def _compare(one: Sequence[Json], other: Sequence[Json], near: float) -> tuple[str, bool]:
    """What is wrong, and whether the outputs part."""
    for place, (token, twin) in enumerate(zip(one, other, strict=False)):
        if token["id"] == twin["id"]:
            if abs(token["logprob"] - twin["logprob"]) > near:
                return f"token {place} has {token['logprob']:.4f}, and {twin['logprob']:.4f}", True
            continue
        pair = {token["id"], twin["id"]}
        for each in (token, twin):
            first, second, *_ = each["top"]
            gap = first["logprob"] - second["logprob"]
            if {first["id"], second["id"]} != pair or gap > near:
                return (
                    f"token {place} is {token['token']!r}, and {twin['token']!r}, without a near tie: {each['top']}",
                    True,
                )
        return "", True
    if len(one) != len(other):
        return f"{len(one)} tokens, and {len(other)}", True
    return "", False
