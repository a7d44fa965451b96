"""How long the server waits for its clients, and how long shutting down may take."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Timeouts:
    """Seconds. A connection without a request under way is closed after `idle_s` to twice that; the head of a request must
    arrive within it, and its body within `body_s`. The body of a refused request is still read and discarded for
    `drain_s`: many clients read no answer before they have sent everything.

    When the server stops, running answers get `grace_s` to finish (none after a second signal), and then
    `last_words_s` to send their last event, or their 503.
    """

    idle_s: float = 30.0
    body_s: float = 60.0
    drain_s: float = 4.0
    grace_s: float = 5.0
    last_words_s: float = 2.0


USUAL = Timeouts()
