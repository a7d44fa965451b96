"""Leaves out what scope.py names, gives each test a workspace, writes down every outcome. scripts/conformance.py sets it up."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import transformers

from conformance import scope, streamed

torch.set_num_threads(1)  # tiny models: a second thread only waits
transformers.utils.logging.set_verbosity_error()
transformers.utils.logging.disable_progress_bar()

TESTS = os.environ.get("CONFORMANCE_TESTS", "")
collect_ignore = [] if TESTS else ["test_families.py"]
sys.path[:0] = [TESTS, str(Path(__file__).parents[1] / "tests")]


@pytest.fixture(autouse=True)
def _workspace() -> Iterator[None]:
    """Each test's models are closed and its checkpoints removed when it ends."""
    streamed.Current.workspace = streamed.Workspace()
    yield
    streamed.Current.workspace.close()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark what scope.py names; nothing is dropped, so that the record has all of it."""
    for item in items:
        left_out = scope.reason_left_out(item.name)
        known = scope.reason_known(item.parent.name if item.parent else "", item.name)
        if left_out:
            item.user_properties.append(("left_out", left_out))
            item.add_marker(pytest.mark.skip(reason=left_out))
        elif known and not streamed.Current.whole:
            item.add_marker(pytest.mark.xfail(reason=known, strict=True))


class Recorder:
    """One entry a report; a test with subtests has several, and scripts/conformance.py takes the worst."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.entries: list[dict[str, str]] = []

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Keep a test's own report, and whatever went wrong around it."""
        if report.when == "call" or not report.passed:
            self.entries.append({"test": report.nodeid, "outcome": outcome(report), "reason": reason(report)})

    def pytest_sessionfinish(self) -> None:
        """Write what was kept."""
        self.path.write_text(json.dumps(self.entries))


def outcome(report: pytest.TestReport) -> str:
    """failed, known, left_out, skipped or passed."""
    if any(name == "left_out" for name, _ in report.user_properties):
        return "left_out"
    if report.skipped and hasattr(report, "wasxfail"):
        return "known"
    return str(report.outcome)


def reason(report: pytest.TestReport) -> str:
    """What a skip says, or what a failure raised; empty where the test passed."""
    if report.passed:
        return ""
    if hasattr(report, "wasxfail"):
        return str(report.wasxfail)
    if isinstance(report.longrepr, tuple):
        return report.longrepr[2].removeprefix("Skipped: ")
    crash = getattr(report.longrepr, "reprcrash", None)
    return str(crash.message if crash else report.longrepr).strip()


def pytest_configure(config: pytest.Config) -> None:
    """Record where the script wants a record."""
    if path := os.environ.get("CONFORMANCE_RECORD"):
        config.pluginmanager.register(Recorder(Path(path)))
