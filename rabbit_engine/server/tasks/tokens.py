"""Texts and their token ids, in the form of vLLM's server."""

from __future__ import annotations

from typing import Any, ClassVar

from rabbit_engine.server.errors import RequestError
from rabbit_engine.server.openai.generating import Asked, template_variables
from rabbit_engine.sessions import Session


class TokenizeRequest(Asked):
    """`POST /tokenize`: a `prompt`, or `messages` through the chat template."""

    path: ClassVar[str] = "/tokenize"
    prompt: str | None = None
    messages: list[Any] | None = None
    add_special_tokens: bool = True
    add_generation_prompt: bool = True
    continue_final_message: bool = False
    tools: list[Any] | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    return_token_strs: bool | None = False


class DetokenizeRequest(Asked):
    """`POST /detokenize`."""

    path: ClassVar[str] = "/detokenize"
    tokens: list[int]


def tokenize(session: Session, asked: TokenizeRequest) -> dict[str, object]:
    """The token ids. Raises RequestError, and as `Session.request` does."""
    if (asked.prompt is None) == (asked.messages is None):
        raise RequestError(400, "give either prompt or messages", param="prompt")
    tokenizer: Any = session.model.tokenizer
    if asked.prompt is not None:
        found: Any = tokenizer(asked.prompt, add_special_tokens=asked.add_special_tokens)
        ids = list(found["input_ids"])
    else:
        template = {"tools": asked.tools, "continue_final_message": asked.continue_final_message}
        given = {name: value for name, value in template.items() if value}
        own = {"add_generation_prompt": asked.add_generation_prompt and not asked.continue_final_message}
        variables = {**template_variables(asked.chat_template_kwargs), **own, **given}
        ids = list(session.request(asked.messages or [], **variables).prompt.ids)
    texts = [str(text) for text in tokenizer.convert_ids_to_tokens(ids)] if asked.return_token_strs else None
    return {"count": len(ids), "max_model_len": session.most_tokens, "tokens": ids, "token_strs": texts}


def detokenize(session: Session, asked: DetokenizeRequest) -> dict[str, object]:
    """Their text. Raises ConfigurationError for ids outside the vocabulary."""
    ids = session.encode(asked.tokens) if asked.tokens else []
    return {"prompt": str(session.model.tokenizer.decode(ids))}
