"""Counts of speculative decoding: what was guessed, what came true, and the seconds of both."""

from __future__ import annotations

from dataclasses import dataclass

from rabbit_engine.utils.sizes import format_seconds


@dataclass(slots=True)
class SpeculationProfile:
    """Counts since the model was loaded, over the texts that speculate.

    `tokens` came from `passes` over answers, plain ones among them; passes that several texts share count for each. Drafts took
    `draft_s` to guess `drafted` tokens; passes verified `nodes` of them and `accepted` came true. `pass_s` are the seconds of
    all passes, also of those over prompts.
    """

    passes: int = 0
    tokens: int = 0
    nodes: int = 0
    drafted: int = 0
    accepted: int = 0
    draft_s: float = 0.0
    pass_s: float = 0.0

    @property
    def tokens_a_pass(self) -> float:
        """Tokens that a pass over an answer gives; 0 before the first."""
        return self.tokens / self.passes if self.passes else 0.0

    @property
    def acceptance(self) -> float:
        """The fraction of verified nodes that came true; 0 before the first."""
        return self.accepted / self.nodes if self.nodes else 0.0

    def add(self, other: SpeculationProfile) -> None:
        """Add the counts of another draft's."""
        for name in self.__slots__:
            setattr(self, name, getattr(self, name) + getattr(other, name))

    def since(self, before: SpeculationProfile) -> SpeculationProfile:
        """The counts from an earlier copy to this one."""
        return SpeculationProfile(**{name: getattr(self, name) - getattr(before, name) for name in self.__slots__})

    def rows(self) -> list[tuple[str, str]]:
        """As (name, value) rows; none if no text speculated."""
        if not self.passes:
            return []
        nodes = f"{self.nodes / self.passes:.1f} nodes verified in each, {self.acceptance:.0%} of them accepted"
        seconds = f"{format_seconds(self.draft_s)} for drafts, {format_seconds(self.pass_s)} for passes"
        return [("speculation", f"{self.tokens_a_pass:.2f} tokens a pass; {nodes}; {seconds}")]
