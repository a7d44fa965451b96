"""The prefix store: what was computed for the beginnings of texts, on disk and in memory. It knows nothing of models."""

from rabbit_engine.prefixes.folder import StoredModel
from rabbit_engine.prefixes.prefix import Prefix
from rabbit_engine.prefixes.store import (
    BLOCK_TOKENS,
    PrefixSpace,
    PrefixStore,
    StoredText,
    default_bytes,
    default_folder,
    open_default,
)

__all__ = [
    "BLOCK_TOKENS",
    "Prefix",
    "PrefixSpace",
    "PrefixStore",
    "StoredModel",
    "StoredText",
    "default_bytes",
    "default_folder",
    "open_default",
]
