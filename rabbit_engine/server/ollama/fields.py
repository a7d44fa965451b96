"""How each field and each option of Ollama's API is handled: honoured (the models of `schema` have it), refused because
ignoring it would change the answer, or ignored because it changes none. An unknown one is refused if it looks like a misspelt
one, and logged otherwise."""

from __future__ import annotations

from rabbit_engine.server.fields import FieldTable

_SAMPLER = "this sampler is not supported; temperature, top_p, top_k, min_p and typical_p are"
_ROPE = "the checkpoint's own is always used"
_IN_OPTIONS = "put it in options"


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
