"""What is known of a model's ways to verify guesses: from the record of its class, and from the trials of passes that ran."""

from __future__ import annotations

from dataclasses import dataclass, field

from rabbit_engine.decoding.support import UNLIMITED
from rabbit_engine.decoding.verification import CarryVerifier, ChainVerifier, TreeVerifier, Verifier

PLAIN = "plain: "
"""What the record says of a class that decodes one token a pass, before the reason."""


@dataclass(slots=True)
class Findings:
    """Which ways compute the same as one token a pass (`proven`) and which do not (`refused`); others need a trial.

    A way is proven for texts of up to a number of tokens (see `proven_length`). `plain` is the reason, if no way is right. `used`
    is how guesses were verified last: "tree", "chain", "carry", or "plain: " and why not at all; empty before the first.
    """

    proven: dict[type[Verifier], int] = field(default_factory=dict)
    refused: set[type[Verifier]] = field(default_factory=set)
    plain: str = ""
    used: str = ""

    @classmethod
    def recorded(cls, speculation: str) -> Findings:
        """From the column "speculation" of the record; nothing is known if it is empty. Raises KeyError for other words."""
        if speculation.startswith(PLAIN):
            return cls(plain=speculation.removeprefix(PLAIN))
        proven, refused = _RECORDED[speculation]
        return cls(dict.fromkeys(proven, UNLIMITED), set(refused))


_RECORDED: dict[str, tuple[tuple[type[Verifier], ...], tuple[type[Verifier], ...]]] = {
    "": ((), ()),
    "tree": ((TreeVerifier, ChainVerifier), ()),
    "chain": ((ChainVerifier,), (TreeVerifier,)),
    "carry": ((CarryVerifier,), ()),
}
