"""What is done with each field of Anthropic's Messages API that the models of `schema` do not have."""

from __future__ import annotations

from rabbit_engine.server.fields import FieldTable

_ELSEWHERE = "it is a field of /v1/chat/completions"
_OWN_TOOLS = "the server runs no tools: the client does"

MESSAGES = FieldTable(
    refused={
        "container": ("the server runs no code", ()),
        "mcp_servers": (_OWN_TOOLS, ()),
        "thread": ("the server keeps no conversations: send all messages", ()),
        "max_tokens_to_sample": ("use max_tokens", ()),
        **dict.fromkeys(("max_completion_tokens", "max_new_tokens", "max_output_tokens"), ("use max_tokens", ())),
        "stop": ("use stop_sequences", ()),
        "prompt": ("use messages", ()),
        "system_prompt": ("use system", ()),
        "functions": ("use tools", ()),
        "parallel_tool_calls": ("use tool_choice.disable_parallel_tool_use", (True,)),
        "response_format": ("use output_config.format", ({"type": "text"},)),
        "reasoning_effort": ("use output_config.effort", ()),
        **dict.fromkeys(("n", "best_of"), ("there is one answer to a request", (1,))),
        **dict.fromkeys(("logprobs", "top_logprobs", "min_p", "logit_bias"), (_ELSEWHERE, (0,))),
        **dict.fromkeys(("presence_penalty", "frequency_penalty"), (_ELSEWHERE, (0,))),
        "repetition_penalty": (_ELSEWHERE, (1,)),
    },
    ignored=frozenset(
        {
            *("metadata", "cache_control", "service_tier", "inference_geo", "speed", "diagnostics", "betas", "anthropic_beta"),
            *("anthropic_version", "user_profile_id", "workspace_id", "billing_policy", "fallbacks", "fallback_credit_token"),
            *("context_management", "compaction"),
        }
    ),
)
"""`context_management` and `compaction` shorten what Anthropic's server reads of a long conversation; here all of it is read."""
