"""Turns tokens into text as they are generated, up to a stop."""

from __future__ import annotations

from collections.abc import Sequence

from rabbit_engine.model.protocols import Decoder

_HALF = "\N{REPLACEMENT CHARACTER}"
"""What a decoder writes for bytes that are not a complete character yet."""


class TextFlow:
    """The text of an answer, piece by piece: joined, the pieces are what the decoder makes of all tokens at once, up to the
    first of `stops`.

    A piece is held back while it is an incomplete character or may begin a stop. `include_stop` keeps the stop in the text;
    `skip_special` drops the names of special tokens.
    """

    def __init__(
        self, decoder: Decoder, stops: Sequence[str] = (), *, include_stop: bool = False, skip_special: bool = True
    ) -> None:
        self._decoder = decoder
        self._stops = tuple(stops)
        self._include_stop, self._skip_special = include_stop, skip_special
        self._tokens: list[int] = []
        self._context, self._read = 0, 0  # tokens up to `_read` are text; those from `_context` show how the next ones join
        self._held = ""
        self.text = ""
        self.stop: str | None = None
        """The stop that ended the text."""

    @property
    def stopped(self) -> bool:
        """Whether a stop ended the text."""
        return self.stop is not None

    def push(self, token: int) -> str:
        """The text that this token completes; often empty."""
        if self.stopped:
            return ""
        self._tokens.append(token)
        new = self._unread()
        if not new or new.endswith(_HALF):
            return ""
        self._context, self._read = self._read, len(self._tokens)
        return self._pass_on(new)

    def end(self) -> str:
        """The text held back, after the last token."""
        if self.stopped:
            return ""
        piece = self._pass_on(self._unread())
        if not self.stopped:
            piece += self._held
            self.text += self._held
        self._held = ""
        return piece

    def _unread(self) -> str:
        before = self._decode(self._tokens[self._context : self._read])
        return self._decode(self._tokens[self._context :])[len(before) :]

    def _decode(self, tokens: Sequence[int]) -> str:
        return str(self._decoder.decode(tokens, skip_special_tokens=self._skip_special, clean_up_tokenization_spaces=False))

    def _pass_on(self, new: str) -> str:
        """The part of the held and new text that no stop can include any more."""
        text = self._held + new
        found = [(start, stop) for stop in self._stops if (start := text.find(stop)) >= 0]
        first, stop = min(found, default=(len(text) - self._longest_beginning(text), ""))
        end = first + len(stop) * self._include_stop
        self.stop = stop or None
        self._held = "" if found else text[end:]
        self.text += text[:end]
        return text[:end]

    def _longest_beginning(self, text: str) -> int:
        """The length of the longest end of `text` that may begin a stop."""
        longest = max((len(stop) - 1 for stop in self._stops), default=0)
        for length in range(min(longest, len(text)), 0, -1):
            if any(stop.startswith(text[-length:]) for stop in self._stops):
                return length
        return 0
