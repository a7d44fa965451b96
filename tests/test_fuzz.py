"""Changed checkpoints, by fixed seeds: `make fuzz` runs many more."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "scripts"))

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="cases run in forked processes with limits of memory")


WEIGHTS = ["bin", "gguf", "index", "index_delete", "journal", "manifest", "manifest_delete", "safetensors", "sharded", "shards"]


def test_a_changed_file_ends_in_an_error_that_names_it_or_the_right_answer() -> None:
    import fuzz

    verdicts = fuzz.fuzz(seed=1, indices=range(140), kinds=WEIGHTS, workers=2)
    assert {index: verdict for index, verdict in verdicts.items() if verdict.outcome in fuzz.WRONG} == {}
    assert len(verdicts) == 140
    assert {verdict.kind for verdict in verdicts.values()} == set(WEIGHTS)


def test_a_case_is_the_same_each_time() -> None:
    import fuzz

    once, again = (fuzz.fuzz(seed=2, indices=[0, 1], kinds=["index"], workers=1) for _ in range(2))
    assert [verdict.change for verdict in once.values()] == [verdict.change for verdict in again.values()]
