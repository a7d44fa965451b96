"""What the doctor says of a cluster's machines; tests/test_cluster_machines.py asks a real one."""

from __future__ import annotations

from dataclasses import replace

import pytest

from rabbit_engine.cluster.machines import MachineFacts
from rabbit_engine.cluster.measure import MachineLink, MachineRates, MeasuredMachine
from rabbit_engine.diagnostics.cluster import (
    judge_authentication,
    judge_links,
    judge_machines,
    judge_measured,
    judge_versions,
)

OWN = {"python": "3.11.7", "torch": "2.9.0"}
FAST = MachineLink(round_trip_s=0.001, rate=1e8)


def machine(
    name: str, *, disk: float = 2e9, compute: float = 2e10, free: int = 10**10, link: MachineLink | None = FAST
) -> MeasuredMachine:
    return MeasuredMachine(
        facts=MachineFacts(
            name=name,
            node_id=f"id of {name}",
            address=name,
            host=f"host-{name}",
            kernel=name,
            processors=2,
            cores=4,
            free_bytes=free,
            versions=OWN,
            authentication=True,
            is_driver=link is None,
        ),
        rates=MachineRates(folder="/w", disk="d", disk_rate=disk, disk_problem="" if disk else "full", compute_rate=compute),
        link=link,
    )


def test_a_cluster_without_faults_is_ok_throughout() -> None:
    several = [machine("a", link=None), machine("b")]
    facts = [one.facts for one in several]
    findings = [judge_machines(facts, "a:6379"), judge_authentication(facts), judge_versions(facts, OWN)]
    findings += [*judge_measured(several), *judge_links(several)]
    assert [finding.name for finding in findings] == ["cluster", "authentication", "versions", "a", "b", "link b"]
    assert {(finding.status, finding.advice) for finding in findings} == {("ok", "")}
    assert findings[0].value == "2 machines at a:6379, 20.00 GB free in all"
    assert (
        findings[3].value
        == "host-a, the driver's: 4 cores, 10.00 GB free, disk 2.00 GB/s, products with one token read 20.00 GB/s"
    )


def test_nodes_of_one_machine_are_told() -> None:
    facts = [replace(machine(name).facts, kernel="one") for name in "ab"]
    assert "2 machines at a:6379, on 1 kernel, " in judge_machines(facts, "a:6379").value


def test_a_driver_outside_of_the_cluster_is_told_what_that_costs() -> None:
    found = judge_machines([replace(machine("pc").facts, node_id=""), machine("a").facts], "a:6379")
    assert (found.status, found.numbers["outside"]) == ("info", ["pc"])
    assert found.advice.startswith("pc is outside of it")


def test_machines_that_ask_for_no_token_are_named_but_not_one_outside_the_cluster() -> None:
    facts = [replace(machine(name).facts, authentication=name == "a") for name in "ab"]
    found = judge_authentication(facts)
    assert (found.status, found.value.split(":")[0]) == ("warn", "b without")
    assert "trusted network" in found.advice
    assert judge_authentication([facts[0], replace(facts[1], node_id="")]).status == "ok"


def test_other_versions_fail_and_are_named() -> None:
    facts = [machine("a").facts, replace(machine("b").facts, versions={**OWN, "torch": "2.8.0"})]
    found = judge_versions(facts, OWN)
    assert (found.status, found.value) == ("fail", "b has torch 2.8.0, the driver 2.9.0")


@pytest.mark.parametrize(
    ("odd", "advice"),
    [
        (machine("c", disk=1.8e9), ""),
        (machine("c", disk=1.5e9), "its disk is far slower than the others' (3.50 GB/s)"),
        (machine("c", disk=5e8), "its disk is slow"),
        (machine("c", disk=0), "it cannot stream"),
        (machine("c", compute=5e9), "its products are far slower than the others' (20.00 GB/s)"),
        (machine("c", free=5 * 10**8), "little memory is free"),
    ],
)
def test_a_slow_machine_is_named_with_what_is_slow(odd: MeasuredMachine, advice: str) -> None:
    found = {finding.name: finding for finding in judge_measured([machine("a", disk=3.5e9), machine("b", disk=3.5e9), odd])}
    assert [found[name].status for name in "ab"] == ["ok", "ok"]
    assert (found["c"].status, found["c"].advice.split(":")[0]) == ("warn" if advice else "ok", advice)


@pytest.mark.parametrize(
    ("link", "advice"),
    [
        (MachineLink(round_trip_s=0.001, rate=1e7), "slower than 1 Gbit/s"),
        (MachineLink(round_trip_s=0.02, rate=1e8), "slow to answer"),
    ],
)
def test_a_slow_link_is_named(link: MachineLink, advice: str) -> None:
    (found,) = judge_links([machine("a", link=None), machine("b", link=link)])
    assert (found.name, found.status, found.advice.split(":")[0]) == ("link b", "warn", advice)
    assert str(link) == found.value
