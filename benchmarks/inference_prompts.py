"""Sixteen prompts of different lengths, for the worker and for what it is compared with."""

from __future__ import annotations

from typing import Final

_SUBJECTS: Final = (
    "the sea",
    "a small town in winter",
    "bread",
    "the first railway",
    "bees",
    "a lighthouse",
    "rain",
    "maps",
)

PROMPTS: Final = tuple(
    text
    for subject in _SUBJECTS
    for text in (
        f"A short story about {subject}:",
        f"Here is what every child should know about {subject}, told slowly and in simple words. To begin with,",
    )
)
