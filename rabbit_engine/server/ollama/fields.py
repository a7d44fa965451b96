"""How each field and each option of Ollama's API is handled: honoured (the models of `schema` have it), refused because
ignoring it would change the answer, or ignored because it changes none. An unknown one is refused if it looks like a misspelt
one, and logged otherwise."""

from __future__ import annotations

import logging
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from rabbit_engine.server.errors import RequestError
from rabbit_engine.sessions.spelling import nearest

logger = logging.getLogger(__name__)

_OFF: tuple[Any, ...] = (None, "", [], {}, False)
"""Values with which a refused field has no effect."""

_MOST_UNKNOWN = 32

_SAMPLER = "this sampler is not supported; temperature, top_p, top_k, min_p and typical_p are"
_ROPE = "the checkpoint's own is always used"
_IN_OPTIONS = "put it in options"


@dataclass(frozen=True, slots=True)
class FieldTable:
    """`refused` has, for each name, the reason and values without effect besides those of `_OFF`; `prefix` goes before names
    in errors."""

    refused: Mapping[str, tuple[str, tuple[Any, ...]]]
    ignored: frozenset[str]
    prefix: str = ""

    def check(self, given: Mapping[str, Any], own: Collection[str]) -> None:
        """Raise RequestError for a field that would change the answer and is not among its `own`."""
        unknown = [name for name in given if name not in own and name not in self.refused and name not in self.ignored]
        if len(unknown) > _MOST_UNKNOWN:
            raise RequestError(400, f"there are {len(unknown)} unknown fields: {self.prefix}{unknown[0][:60]} is one")
        for name, (why, neutral) in self.refused.items():
            value = given.get(name)
            if name not in own and not _is_off(value) and value not in neutral:
                raise RequestError(400, f"{self.prefix}{name} is not supported: {why}", param=self.prefix + name)
        for name in unknown:
            if given[name] is not None:
                self._meet(name, own)

    def _meet(self, name: str, own: Collection[str]) -> None:
        shown = self.prefix + name[:60]
        if near := nearest(name, [*(other for other in own if other != "model"), *self.refused]):
            raise RequestError(400, f"{shown!r} is not a field of this request: did you mean {near!r}?", param=shown)
        tell_once(f"a request has the unknown field {shown!r}: it has no effect")


def _is_off(value: object) -> bool:
    return any(value == off and type(value) is type(off) for off in _OFF)


@lru_cache(maxsize=128)
def tell_once(text: str) -> None:
    """Log a warning, unless it was logged lately."""
    logger.warning("%s", text)


REQUEST = FieldTable(
    refused={
        "suffix": ("text can be continued only at its end", ()),
        "template": ("the checkpoint's own is always used; raw: true uses none", ()),
        **dict.fromkeys(("width", "height", "steps"), ("answers are text", (0,))),
        "adapters": ("the server serves the models it was started with", ()),
        **dict.fromkeys(("temperature", "top_p", "top_k", "min_p", "seed", "stop", "num_predict"), (_IN_OPTIONS, ())),
        **dict.fromkeys(("repeat_penalty", "presence_penalty", "frequency_penalty"), (_IN_OPTIONS, ())),
        **dict.fromkeys(("max_tokens", "max_completion_tokens"), ("use options.num_predict", ())),
        **dict.fromkeys(("response_format", "schema"), ("use format", ())),
        "tool_choice": ("use /v1/chat/completions", ("auto",)),
    },
    ignored=frozenset(
        {"user", "metadata", "num_ctx", "truncate", "shift", "name", "chat_id", "session_id", "verbose", "insecure"}
    ),
)

OPTIONS = FieldTable(
    refused={
        "tfs_z": (_SAMPLER, (1,)),
        "mirostat": (_SAMPLER, (0,)),
        "top_a": (_SAMPLER, (0,)),
        "top_n_sigma": (_SAMPLER, (0, -1)),
        **dict.fromkeys(("xtc_probability", "dry_multiplier", "dynatemp_range", "smoothing_factor"), (_SAMPLER, (0,))),
        "penalize_newline": ("repeat_penalty covers all tokens", (True, False)),
        "repeat_last_n": ("repeat_penalty covers the whole text", (64, -1)),
        "num_return_sequences": ("there is one answer to a request", (1,)),
        **dict.fromkeys(("rope_frequency_base", "rope_frequency_scale"), (_ROPE, (0,))),
        **dict.fromkeys(("max_tokens", "max_new_tokens", "n_predict"), ("use num_predict", (-1,))),
        "repetition_penalty": ("use repeat_penalty", (1,)),
        **dict.fromkeys(("format", "keep_alive", "think", "system", "raw"), ("put it in the request itself", ())),
        **dict.fromkeys(("grammar", "json_schema"), ("use format", ())),
    },
    ignored=frozenset(
        {
            *("numa", "num_batch", "num_gpu", "main_gpu", "low_vram", "f16_kv", "logits_all", "vocab_only", "use_mmap"),
            *("use_mlock", "embedding_only", "num_thread", "num_keep", "num_gqa", "num_parallel", "flash_attn", "kv_cache_type"),
            *("mirostat_tau", "mirostat_eta", "tensor_split", "draft_num_predict", "shift", "truncate"),
        }
    ),
    prefix="options.",
)
"""Without mirostat, which is refused, its two parameters have no effect."""
