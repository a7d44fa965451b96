"""Damages thousands of checkpoints: each must end in a RabbitError that names the file, or load correctly.

    python scripts/fuzz.py --cases 10000 --seed 1
    python scripts/fuzz.py --kind gguf --kind bin --cases 500
    python scripts/fuzz.py --seed 1 --replay 4711

A case is a tiny checkpoint with one file changed at random: truncated, bits flipped, JSON values of other types, or replaced.
Correct is a RabbitError that names the file or its folder, or logits equal to those before the change or to transformers' for
the same files. Wrong is any other exception, an error that names nothing, other logits, more than 10 s or 3 GiB, or a changed
file outside the checkpoint. Exit code 1 if a case is wrong.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from fuzzing.checkpoints import KINDS
from fuzzing.judge import RIGHT, WRONG, Verdict, be_quiet, make_bases
from fuzzing.workers import run_cases


def fuzz(seed: int, indices: Sequence[int], kinds: Sequence[str], workers: int) -> dict[int, Verdict]:
    """Judge the cases; index -> verdict. Wrong ones are printed as they come."""
    be_quiet()
    chosen, verdicts = list(kinds) or list(KINDS), {}
    with tempfile.TemporaryDirectory(prefix="rabbit-fuzz-") as root:
        answers = make_bases(Path(root), chosen)
        for index, verdict in run_cases(Path(root), seed, indices, answers, workers):
            verdicts[index] = verdict
            if verdict.outcome in WRONG:
                print(_told(seed, index, kinds, verdict), flush=True)
    return verdicts


def _told(seed: int, index: int, kinds: Sequence[str], verdict: Verdict) -> str:
    options = "".join(f" --kind {kind}" for kind in kinds)
    return (
        f"{verdict.outcome}: {verdict.kind}, {verdict.change}\n    {verdict.said}\n"
        f"    again: python scripts/fuzz.py --seed {seed}{options} --replay {index}"
    )


def table(verdicts: dict[int, Verdict]) -> str:
    """The number of cases by kind and outcome."""
    counts = Counter((verdict.kind, verdict.outcome) for verdict in verdicts.values())
    outcomes = [*RIGHT, *WRONG]
    rows = [["kind", *outcomes]]
    rows += [[kind, *(str(counts[kind, o]) for o in outcomes)] for kind in sorted({kind for kind, _ in counts})]
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return "\n".join("  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in rows)


def main() -> None:
    """See above."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--cases", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--kind", action="append", default=[], choices=sorted(KINDS), help="only these kinds; may be repeated")
    parser.add_argument("--replay", type=int, action="append", help="only this case; pass the seed and kinds it was found with")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1)
    arguments = parser.parse_args()
    indices = arguments.replay or range(arguments.cases)
    verdicts = fuzz(arguments.seed, indices, arguments.kind, arguments.workers)
    if arguments.replay:
        print(*(f"{v.outcome}: {v.kind}, {v.change}\n    {v.said}" for v in verdicts.values()), sep="\n")
    wrong = sum(verdict.outcome in WRONG for verdict in verdicts.values())
    print(table(verdicts))
    print(f"{wrong} of {len(verdicts)} cases are wrong")
    sys.exit(bool(wrong))


if __name__ == "__main__":
    main()
