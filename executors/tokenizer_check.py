"""A look at a tokenizer's configuration before a library follows it. The file may come from anywhere."""

from __future__ import annotations

from executors.errors import ModelLoadError

_NEVER_PATHS = ("vocab", "merges")


def check_tokenizer_config(location: str, **options: object) -> None:
    """Make sure that loading a tokenizer reads no files beside its own.

    Some tokenizers of Transformers take `vocab` for the path of a file, each line of which becomes a token.

    Args:
        location: a folder or a hub name.
        options: which revision.

    Raises:
        ModelLoadError: it names a file.
        OSError: it cannot be read.
    """
    from transformers.models.auto.tokenization_auto import get_tokenizer_config

    revision = options.get("revision")
    config = get_tokenizer_config(location, **({"revision": revision} if revision else {}))
    for key in _NEVER_PATHS:
        if isinstance(config.get(key), str):
            raise ModelLoadError(
                f"the tokenizer_config.json of {location!r} names a file of this host as its {key}; expected none",
                hint="Remove that key from the file: a tokenizer's own files are found by their names.",
            )
