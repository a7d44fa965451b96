"""The runs as text: the table of medians with every round, the trials, the failures, and which lanes gave equal tokens."""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Callable, Sequence

from peers.lanes import Run

HEADER = """\
| lane | s a token | every round | first token, s | load, s | read a token, GB | peak RSS, GB |
|---|---|---|---|---|---|---|"""


def as_markdown(lanes: Sequence[str], runs: Sequence[Run]) -> str:
    """The whole report; `lanes` gives the order."""
    sections = [
        "\n".join([HEADER, *(_row(lane, [run for run in runs if run.lane == lane]) for lane in lanes)]),
        "Peak RSS includes pages of mapped files, which the kernel can reclaim.",
        _tokens([run for lane in lanes for run in runs if run.lane == lane and _has_text(run)]),
        "\n".join(_trial(run) for run in runs if not _is_round(run)),
    ]
    return "\n\n".join(section for section in sections if section)


def _is_round(run: Run) -> bool:
    return run.phase.startswith("round")


def _has_text(run: Run) -> bool:
    return _is_round(run) and run.outcome == "ok" and run.figures.get("peer") != "disk"


def _row(lane: str, runs: Sequence[Run]) -> str:
    """One lane's medians; of a lane without a survivor, what became of its runs."""
    rounds = [run for run in runs if _is_round(run)]
    survivors = [run for run in rounds if run.outcome == "ok"]
    if not survivors:
        return f"| {lane} | - | {_failures(rounds or runs)} | - | - | - | - |"
    every = ", ".join(f"{run.token_s:.2f}" if run.outcome == "ok" else run.outcome for run in rounds)

    def median(figure: Callable[[Run], float]) -> str:
        return f"{statistics.median(map(figure, survivors)):.2f}"

    name = " ".join((lane, *survivors[0].settings))
    cells = (
        name,
        median(lambda run: run.token_s),
        every,
        median(lambda run: run.figures["first_token_s"]),
        median(lambda run: run.figures["load_s"]),
        median(lambda run: run.read_bytes_a_token / 1e9),
        median(lambda run: run.figures["peak_rss_bytes"] / 1e9),
    )
    return f"| {' | '.join(cells)} |"


def _failures(runs: Sequence[Run]) -> str:
    """`1 of 1 runs timed out after 120 s`, and whatever else happened."""
    counts = Counter((run.outcome, run.error) for run in runs if run.outcome != "ok")
    found = [f"{count} of {len(runs)} runs {outcome}{_because(outcome, error)}" for (outcome, error), count in counts.items()]
    return "; ".join(found) or "did not run"


def _because(outcome: str, error: str | None) -> str:
    joint = " " if outcome == "timed out" else ": "
    return f"{joint}{error}" if error else ""


def _tokens(survivors: Sequence[Run]) -> str:
    """Which lanes gave the same tokens: one line for each different answer, empty if there are no answers."""
    answers: dict[tuple[int, ...], list[str]] = {}
    for run in survivors:
        lanes = answers.setdefault(tuple(run.figures["tokens"]), [])
        if run.lane not in lanes:
            lanes.append(run.lane)
    if not answers:
        return ""
    if len(answers) == 1:
        return f"Tokens were equal in all lanes and rounds: {list(*answers)}."
    return "\n".join(["Tokens differed:", *(f"- {', '.join(lanes)}: {list(tokens)}" for tokens, lanes in answers.items())])


def _trial(run: Run) -> str:
    """The outcome of a preparation or a trial."""
    name = " ".join((run.phase, run.lane, *run.settings))
    if run.outcome != "ok":
        return f"- {name}: {run.outcome}{_because(run.outcome, run.error)}"
    seconds = f"{run.wall_s:.0f} s" if run.phase == "prepare" else f"{run.token_s:.2f} s a token"
    return f"- {name}: {seconds}"
