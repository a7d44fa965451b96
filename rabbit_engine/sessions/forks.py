"""`Fork`: a prefix that is computed once and continued many times."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Self

from rabbit_engine.errors import ConfigurationError, PromptTooLongError
from rabbit_engine.sessions.asking import AnswerMethods, Chat
from rabbit_engine.sessions.encoding import Encoder, read_ids, require_text_generation
from rabbit_engine.sessions.held import HeldPrefix
from rabbit_engine.sessions.messages import has_images, read_messages
from rabbit_engine.sessions.underway import Request, Tell, Ticket

if TYPE_CHECKING:
    from rabbit_engine.sessions.session import Session

Prefix = str | Sequence[int] | Sequence[object]
"""A text or token ids, or messages."""

_ANSWERED = ("user", "tool", "function")
"""Roles whose messages an answer follows."""


class Fork(AnswerMethods):
    """Texts that begin with the same prefix, which is computed once: as `Session.fork` returned it.

    Continuations of a text or token ids are for `generate`, the messages that follow others for `chat` and `stream`; each has
    the options of the session's method. All are under way at once, also with the session's other texts, and each has, bit for
    bit, the tokens that `model.generate` gives it with a copy of the prefix's cache. An empty continuation is one, too: several
    answers to the prefix itself.

    The last token of the prefix is computed with each continuation, so that it may become another one where the texts meet.
    """

    def __init__(
        self,
        session: Session,
        encoder: Encoder,
        hold: Callable[[Sequence[int]], HeldPrefix],
        prefix: Prefix,
        template: Mapping[str, object],
    ) -> None:
        require_text_generation(session.model)
        self._session, self._encoder, self._template = session, encoder, dict(template)
        self._text: str | list[int] | None = None
        self._messages: list[dict[str, object]] = []
        if isinstance(prefix, str) or _is_ids(prefix):
            if template:
                raise ConfigurationError(
                    f"{next(iter(template))}: a text has no chat template; a conversation is a list of messages"
                )
            self._text = prefix if isinstance(prefix, str) else read_ids(prefix)
            ids = encoder.encode_text(self._text)
        else:
            self._messages = read_messages(prefix, with_images=session.takes_images)
            ids = self._common_ids()
        if len(ids) < 2:
            raise ConfigurationError(
                f"a prefix of {len(ids)} token saves nothing: its last token is computed with each continuation"
            )
        if len(ids) >= session.most_tokens:
            raise PromptTooLongError(
                f"a prefix of {len(ids)} tokens leaves no room for an answer in the {session.most_tokens} that fit: shorten it, "
                "or, if memory is the limit, load the model with a larger max_seq_len"
            )
        self._held = hold(ids[:-1])

    @property
    def tokens(self) -> int:
        """The tokens that are computed once."""
        return len(self._held.ids)

    @property
    def nbytes(self) -> int:
        """Bytes in memory, without those of the texts under way."""
        return self._held.nbytes

    def request(self, messages: Chat, /, **options: object) -> Request:
        """Encode the messages that follow the prefix. Raises as `chat` does."""
        self._require_open()
        if self._text is not None:
            raise ConfigurationError("the prefix is a text, which generate continues: fork a list of messages to chat")
        more = read_messages(messages, with_images=self._session.takes_images) if messages else []
        if has_images(more):
            raise ConfigurationError("a fork does not take images: call session.chat with the whole conversation")
        return self._with_prefix(self._session.request([*self._messages, *more], **(self._template | options)))

    def request_text(self, text: str | Sequence[int], *, special_tokens: bool = True, **options: object) -> Request:
        """Encode a text, or token ids, that follow the prefix: the prefix and a text are encoded together, with the special
        tokens that the prefix has."""
        if not special_tokens:
            raise ConfigurationError("special_tokens=False: the prefix has them already; fork token ids to have none")
        self._require_open()
        if self._text is None:
            raise ConfigurationError("the prefix is a conversation, which chat and stream continue: fork a text for generate")
        if isinstance(text, str) and isinstance(self._text, str):
            return self._with_prefix(self._session.request_text(self._text + text, special_tokens=True, **options))
        if isinstance(text, str):
            raise ConfigurationError("the prefix is token ids: give token ids to continue it, or fork a text")
        ids = [*self._encoder.encode_text(self._text), *read_ids(text)]
        return self._with_prefix(self._session.request_text(ids, special_tokens=True, **options))

    def ask(self, requests: Sequence[Request], tell: Tell, *, bounded: bool = True) -> list[Ticket]:
        """`Session.ask`."""
        return self._session.ask(requests, tell, bounded=bounded)

    def require_process(self) -> None:
        """`Session.require_process`."""
        self._session.require_process()

    def require_other_thread(self) -> None:
        """`Session.require_other_thread`."""
        self._session.require_other_thread()

    def close(self) -> None:
        """Free the prefix. Answers under way go on, those that have not begun fail. Idempotent."""
        self._held.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _require_open(self) -> None:
        if self._held.is_closed:
            raise ConfigurationError("the fork is closed: make another with session.fork")
        self._held.require_same_model()

    def _with_prefix(self, request: Request) -> Request:
        """The request, if its prompt begins with the prefix. Raises ConfigurationError, PromptTooLongError."""
        ids, held = request.prompt.ids, self._held.ids
        if request.prompt.cut_tokens:
            raise PromptTooLongError(
                f"the prefix and what follows it are {request.prompt.cut_tokens} tokens longer than what fits: a fork does not "
                "truncate them"
            )
        if ids[: len(held)] != held or len(ids) == len(held):
            same = next((index for index, pair in enumerate(zip(ids, held, strict=False)) if pair[0] != pair[1]), len(ids))
            raise ConfigurationError(
                f"with what follows, only {same} tokens of the prefix's {len(held)} are the same (a chat template may write "
                "earlier messages otherwise then): fork a shorter prefix, or call the session with whole prompts"
            )
        return replace(request, held=self._held)

    def _common_ids(self) -> list[int]:
        """The tokens with which every conversation that continues the messages begins. Raises ConfigurationError."""
        if has_images(self._messages):
            raise ConfigurationError("a fork does not take images: call session.chat with the whole conversation")
        answered = bool(self._messages) and self._messages[-1].get("role") in _ANSWERED
        first, second = ([], [_says("assistant", "0")]) if answered else ([_says("user", "0")], [_says("user", "x")])
        found = self._encode(first)
        try:
            other = self._encode(second)
        except ConfigurationError:
            if not answered:
                raise
            other = found  # the template takes no message that it would have to write itself
        same = next((index for index, pair in enumerate(zip(found, other, strict=False)) if pair[0] != pair[1]), None)
        return found[: min(len(found), len(other)) if same is None else same]

    def _encode(self, more: Sequence[Mapping[str, object]]) -> list[int]:
        return self._encoder.encode_messages([*self._messages, *more], self._template)


def _says(role: str, content: str) -> dict[str, object]:
    return {"role": role, "content": content}


def _is_ids(prefix: object) -> bool:
    if isinstance(prefix, range) or hasattr(prefix, "tolist"):
        return True
    return isinstance(prefix, list | tuple) and bool(prefix) and all(hasattr(one, "__index__") for one in prefix)
