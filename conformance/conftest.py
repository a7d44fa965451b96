"""Leaves out the tests that scope.py names, gives each test a workspace, records outcomes. scripts/conformance.py runs it."""

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

torch.set_num_threads(1)  # for tiny models a second thread gains nothing
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
    """Mark the tests that scope.py names; none is removed, so that the record is complete."""
    for item in items:
        left_out = scope.reason_left_out(item.name)
        known = scope.reason_known(item.parent.name if item.parent else "", item.name)
        if left_out:
            item.user_properties.append(("left_out", left_out))
            item.add_marker(pytest.mark.skip(reason=left_out))
        elif known and not streamed.Current.whole:
            item.add_marker(pytest.mark.xfail(reason=known, strict=True))


class Recorder:
    """One entry per report; a test with subtests has several, and scripts/conformance.py takes the worst."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.entries: list[dict[str, str]] = []

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Keep a test's own report, and failures of its setup or teardown."""
        if report.when == "call" or not report.passed:
            self.entries.append({"test": report.nodeid, "outcome": outcome(report), "reason": reason(report)})

    def pytest_sessionfinish(self) -> None:
        """Write the entries."""
        self.path.write_text(json.dumps(self.entries))


def outcome(report: pytest.TestReport) -> str:
    """failed, known, left_out, skipped or passed."""
    if any(name == "left_out" for name, _ in report.user_properties):
        return "left_out"
    if report.skipped and hasattr(report, "wasxfail"):
        return "known"
    return str(report.outcome)


def reason(report: pytest.TestReport) -> str:
    """The reason for a skip, or what a failure raised; empty if the test passed."""
    if report.passed:
        return ""
    if hasattr(report, "wasxfail"):
        return str(report.wasxfail)
    if isinstance(report.longrepr, tuple):
        return report.longrepr[2].removeprefix("Skipped: ")
    crash = getattr(report.longrepr, "reprcrash", None)
    return str(crash.message if crash else report.longrepr).strip()


def pytest_configure(config: pytest.Config) -> None:
    """Record the outcomes if the script asks for them."""
    if path := os.environ.get("CONFORMANCE_RECORD"):
        config.pluginmanager.register(Recorder(Path(path)))
