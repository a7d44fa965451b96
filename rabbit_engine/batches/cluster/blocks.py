"""Blocks of lines and of answers as the tables that Ray Data passes on."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING

from rabbit_engine.batches.cluster.order import Failure, LineAnswer
from rabbit_engine.batches.inputs import InputLine
from rabbit_engine.batches.window import Answered

if TYPE_CHECKING:
    import pyarrow as pa


def table_of_lines(lines: Sequence[InputLine]) -> pa.Table:
    """Columns `number` and `raw`."""
    import pyarrow as pa

    numbers, raws = [line.number for line in lines], [line.raw for line in lines]
    return pa.table({"number": pa.array(numbers, pa.int64()), "raw": pa.array(raws, pa.large_binary())})


def lines_of(table: pa.Table) -> list[InputLine]:
    """The lines of a block."""
    return [InputLine(row["number"], row["raw"]) for row in table.to_pylist()]


def answer_of(answered: Answered, tokens: int) -> LineAnswer:
    """An answer as text, whose JSON is that of the output file."""
    error = None if answered.error is None else json.dumps(answered.error)
    line = answered.line
    return LineAnswer(line.number, line.checksum, answered.custom_id, json.dumps(answered.response), error, tokens)


def table_of(answers: Iterable[LineAnswer], failure: Failure | None = None) -> pa.Table:
    """A row for each answer, and one for a failure."""
    import pyarrow as pa

    rows = [answer._asdict() for answer in answers] + ([] if failure is None else [failure._asdict()])
    text = pa.large_string()
    types = {"number": pa.int64(), "checksum": pa.uint64(), "tokens": pa.int64()}
    names = (*LineAnswer._fields, *Failure._fields)
    return pa.Table.from_pylist(rows, pa.schema([(name, types.get(name, text)) for name in names]))


def read_table(table: pa.Table) -> Iterator[LineAnswer | Failure]:
    """The rows of `table_of`."""
    for row in table.to_pylist():
        if row["kind"] is None:
            yield LineAnswer(**{name: row[name] for name in LineAnswer._fields})
        else:
            yield Failure(**{name: row[name] for name in Failure._fields})
