"""The variables that a conversation may pass to the chat template."""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping

from rabbit_engine.errors import ConfigurationError
from rabbit_engine.model.protocols import SessionModel
from rabbit_engine.sessions.foreign import refuse_foreign
from rabbit_engine.sessions.options import NAMES
from rabbit_engine.sessions.spelling import nearest

logger = logging.getLogger(__name__)

_TEMPLATE_KNOWN = frozenset({"tools", "documents", "add_generation_prompt", "continue_final_message", "chat_template"})
_TEMPLATE_OWN = frozenset(
    {"conversation", "messages", "tokenize", "padding", "truncation", "max_length", "return_tensors", "return_dict"}
    | {"tokenizer_kwargs", "processor_kwargs", "return_assistant_tokens_mask"}
)
"""Keywords of `apply_chat_template`."""

_MOST_TOLD = 100
_MOST_VARIABLES = 64
"""The most variables of the chat template for one conversation."""


class TemplateVariables:
    """The variables that a model's chat template reads."""

    def __init__(self, model: SessionModel) -> None:
        self._model = model
        self._told: set[str] = set()

    def check(self, given: Mapping[str, object]) -> None:
        """Raise ConfigurationError for a variable that must not be set or a misspelt option; warn once about a variable that
        the template does not read."""
        if len(given) > _MOST_VARIABLES:
            raise ConfigurationError(f"{len(given)} variables for the chat template are more than {_MOST_VARIABLES}")
        for name in given:
            if name in _TEMPLATE_OWN:
                raise ConfigurationError(f"{name} cannot be set: the session always encodes the whole conversation")
            if name in _TEMPLATE_KNOWN or self.reads(name):
                continue
            refuse_foreign(name, given[name])
            if near := nearest(name, NAMES):
                raise ConfigurationError(f"{name}: no such option; did you mean {near}?")
            if name not in self._told and len(self._told) < _MOST_TOLD:
                self._told.add(name)
                logger.warning("%.60s is not an option, and the chat template does not read it: it has no effect", name)

    def reads(self, name: str) -> bool:
        """Whether the chat template has a variable of this name; the n in `\\n` does not count."""
        return reads(str(getattr(self._model.tokenizer, "chat_template", "")), name)


def reads(template: str, name: str) -> bool:
    """Whether a chat template has a variable of this name."""
    return re.search(rf"(?<!\\)\b{re.escape(name)}\b", template) is not None
