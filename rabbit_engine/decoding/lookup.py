"""A draft without a model: how the text went on where it was the same before, and successors that the model found likely."""

from __future__ import annotations

import heapq
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import count
from typing import NamedTuple

from rabbit_engine.decoding.draft import Allowance, TargetModel, Verdict, check_nodes
from rabbit_engine.decoding.occurrences import LONGEST, Occurrences
from rabbit_engine.decoding.odds import Odds
from rabbit_engine.decoding.recycling import KEPT, Successors
from rabbit_engine.decoding.tree import ROOT, Tree

_MATCHES = 32
_NEWEST = 8
"""Occurrences that are looked at: of the text's end, and of a guessed token alone."""

_LEAST = 1e-3
"""Guesses below this probability are not proposed."""

_REPEATED = (-1.2, 4.5, -0.95, 1.2, 0.0, -0.45, -1.0, -1.65)
_RECYCLED = (-1.9, -2.0, 0.1)
"""Weights of the features below, fitted to 48 answers of SmolLM2-135M-Instruct and of people: chat, code, summaries, JSON."""

_MOST_REPLACED = 2
"""Tokens in succession that may differ before a match is given up: a row of a table differs from the last one in a few digits."""

_RESUMED = 2
"""Tokens that a match counts after a replaced one."""


class Match(NamedTuple):
    """How many tokens of a place equal those before a guess, the position after them, and how many before them differ."""

    length: int
    position: int
    replaced: int = 0

    def one_on(self) -> Match:
        """With one more token."""
        return Match(self.length + 1, self.position + 1, self.replaced)


class Lookup:
    """Guesses from the text itself: continuations of earlier occurrences of its end, in the prompt and in the answer so far.

    It needs no model, 16 bytes of memory a token and 32 a token of the vocabulary. `nodes` fixes the size of each tree; None: as
    many as pay. With `recycling` a tree also has what the model found likely after the same tokens, in this text or another one.
    """

    name = "lookup"
    nbytes = 0

    def __init__(self, nodes: int | None = None, *, recycling: bool = True) -> None:
        check_nodes(nodes)
        self.nodes = nodes
        self._successors = Successors() if recycling else None

    def attach(self, target: TargetModel) -> None:
        """It fits every model."""

    def start(self) -> LookupDrafter:
        """Begin a text."""
        return LookupDrafter(self._successors)


@dataclass(slots=True)
class _Guess:
    """A token, why it is guessed, and its node if the tree has it."""

    token: int
    matches: list[Match]
    odds: Odds
    features: tuple[float, ...]
    node: int | None = None


@dataclass(slots=True)
class LookupDrafter:
    """Lookup in one text."""

    _successors: Successors | None
    _text: Occurrences = field(default_factory=Occurrences)
    _repeated: Odds = field(default_factory=lambda: Odds(_REPEATED))
    _recycled: Odds = field(default_factory=lambda: Odds(_RECYCLED))
    _guesses: dict[int, list[_Guess]] = field(default_factory=dict)
    """After each node of the last tree, and after ROOT: those in the tree and those left out."""
    _resumed: Match | None = None
    """The match that the text followed up to its last token, as if that one were the same."""

    def read(self, ids: Sequence[int]) -> None:
        """See `Drafter`: it reads quickly enough for `propose`."""

    def propose(self, ids: Sequence[int], budget: Allowance) -> Tree:
        """Continuations of earlier occurrences of the end of `ids`, the likeliest first."""
        new = ids[len(self._text) :]
        self._learn(new)
        self._text.extend(new)
        return self._grow(budget)

    def accepted(self, verdict: Verdict) -> None:
        """Keep the successors; which guesses were right shows in the text itself, also of trees that were not verified."""
        if self._successors is not None:
            self._successors.learn(self._text[-1], verdict)

    def close(self) -> None:
        """Nothing of it is outside."""

    def _learn(self, new: Sequence[int]) -> None:
        """Hold the last guesses against what the text became."""
        at: int | None = ROOT
        for token in new:
            guesses = self._guesses.get(at, []) if at is not None else []
            right = next((guess for guess in guesses if guess.token == token), None)
            for guess in guesses[: guesses.index(right) + 1] if right else guesses:
                guess.odds.learn(guess.features, guess is right)
            self._resumed = _resumed(guesses, right)
            at = right.node if right else None

    def _grow(self, budget: Allowance) -> Tree:
        """Best first: each node's guesses are made when it is taken."""
        tokens: list[int] = []
        parents: list[int] = []
        probabilities: list[float] = []
        order = count()
        self._guesses = {}
        open_guesses: list[tuple[float, int, int, tuple[int, ...], _Guess]] = []

        def expand(node: int, path: tuple[int, ...], matches: list[Match], above: float) -> None:
            guesses = self._guesses[node] = list(self._guesses_after(path, matches))
            for guess in guesses:
                likely = above * guess.odds.probability(guess.features)
                above -= likely
                if likely >= _LEAST:
                    heapq.heappush(open_guesses, (-likely, next(order), node, path, guess))

        if budget.depth and len(self._text):
            expand(ROOT, (), self._matches(), 1.0)
        while open_guesses and len(tokens) < budget.nodes:
            negative, _, parent, path, guess = heapq.heappop(open_guesses)
            guess.node = len(tokens)
            tokens.append(guess.token)
            parents.append(parent)
            probabilities.append(-negative)
            if len(path) + 1 < budget.depth:
                expand(guess.node, (*path, guess.token), guess.matches, -negative)
        return Tree(tuple(tokens), tuple(parents), tuple(probabilities))

    def _matches(self) -> list[Match]:
        """Of the end of the text, the longest first."""
        matches = {position: Match(length, position) for length, position in self._text.matches_of_end(_MATCHES)}
        resumed = self._resumed
        if resumed is not None and resumed.position < len(self._text):
            matches[resumed.position] = max(resumed, matches.get(resumed.position, resumed))
        return sorted(matches.values(), reverse=True)

    def _guesses_after(self, path: tuple[int, ...], matches: list[Match]) -> Iterator[_Guess]:
        """What may follow a path of guesses: each guess counts for the case that those before it are wrong."""
        likely = () if self._successors is None else self._successors.after(path[-1] if path else self._text[-1])
        continuations = self._continuations(path, matches)
        for rank, (token, found) in enumerate(continuations.items()):
            yield _Guess(token, found, self._repeated, _features(rank, found, _place(token, likely)))
        for rank, token in enumerate(likely):
            if token not in continuations:
                yield _Guess(token, [], self._recycled, (1.0, rank / (KEPT - 1), float(bool(continuations))))

    def _continuations(self, path: tuple[int, ...], matches: list[Match]) -> dict[int, list[Match]]:
        """Tokens that followed, by the longest match of each, and their matches one token on.

        A match that reaches the end of the text goes on in the guesses: so a loop is followed around.
        """
        if path:
            known = {match.position for match in matches}
            newest = self._text.positions_after(path[-1], _NEWEST)
            matches = matches + [Match(1, position) for position in newest if position not in known]
        found: dict[int, list[Match]] = {}
        for match in matches:
            beyond = match.position - len(self._text)
            token = self._text[match.position] if beyond < 0 else path[beyond]
            found.setdefault(token, []).append(match.one_on())
        return found


def _resumed(guesses: Sequence[_Guess], right: _Guess | None) -> Match | None:
    """The match to follow after a token: the right guess's, else the first one's as if its token were the text's."""
    if right is not None or not guesses:
        return right.matches[0] if right and right.matches else None
    match = next(iter(guesses[0].matches), None)
    if match is None or match.length <= _RESUMED or match.replaced == _MOST_REPLACED:
        return None
    return Match(_RESUMED, match.position, match.replaced + 1)


def _place(token: int, likely: Sequence[int]) -> int | None:
    """Its place among the likely successors: 0 first, 1 later, 2 not among them; None if they are not known."""
    if not likely:
        return None
    return 0 if token == likely[0] else 1 if token in likely else 2


def _features(rank: int, found: list[Match], place: int | None) -> tuple[float, ...]:
    """Of a token that followed before: of its longest match, and how many say so."""
    length = math.log2(found[0].length - 1) / math.log2(LONGEST)
    agreeing = (min(len(found), 3) - 1) / 2
    replaced = found[0].replaced / _MOST_REPLACED
    return (1.0, length, min(rank, 3) / 3, agreeing, float(place == 0), float(place == 1), float(place == 2), replaced)
