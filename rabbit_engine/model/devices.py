"""A model over several devices of this machine: which layers each has."""

from __future__ import annotations

import functools
import logging
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

from rabbit_engine.checkpoints import Streamable
from rabbit_engine.devices import DeviceRow
from rabbit_engine.model.settings import LoadSettings
from rabbit_engine.model.stages import LocalStage, Opened, load_in_stages
from rabbit_engine.planning.device_rows import plan_row, shares_of
from rabbit_engine.planning.forecast import forecast
from rabbit_engine.planning.partition import Partition
from rabbit_engine.planning.plan import Plan

logger = logging.getLogger(__name__)


def load_on_devices(name: str | Path, settings: LoadSettings, row: DeviceRow) -> Any:
    """Load a model whose layers are divided among the devices of `row`; the first has all that is not a layer."""
    open_stages = functools.partial(_open, name=name, settings=replace(settings, row=None), row=row)
    return load_in_stages(name, settings, open_stages, required=row.is_named)


def _open(partition: Partition, _: Streamable, *, name: str | Path, settings: LoadSettings, row: DeviceRow) -> Opened:
    plan = plan_row(partition, row, settings.stream)
    logger.info("devices:\n%s", plan)
    shares, devices = shares_of(plan, partition, settings.stream), {one.name: one.device for one in row.devices}
    driver = shares[plan.driver.name]
    there = [one for one in plan.held if one.machine.name != plan.driver.name]
    if not there and not row.is_named:
        return Opened(())

    def open_one(place: str, layers: tuple[int, ...]) -> LocalStage:
        share = shares[place]
        stream = replace(
            settings.stream,
            device=devices[place],
            device_budget_bytes=share.device_bytes,
            host_budget_bytes=share.host_bytes,
            max_seq_len=None,
            draft_bytes=0,
        )
        return LocalStage(name, replace(settings, stream=stream), layers, place)

    with ThreadPoolExecutor(max(1, len(there))) as pool:
        opening = [pool.submit(open_one, one.machine.name, one.layers) for one in there]
    stages = [one.result() for one in opening if one.exception() is None]
    for one in opening:
        if (error := one.exception()) is not None:
            for stage in stages:
                stage.close()
            raise error
    return Opened(stages, driver.device_bytes + settings.stream.draft_bytes, plan, driver.host_bytes)


def forecast_row(name: str | Path, settings: LoadSettings, row: DeviceRow) -> Plan:
    """The plan that loading over the devices of `row` would make: see `planning.forecast`."""

    def decide(partition: Partition, stream: Any) -> Plan:
        plan = plan_row(partition, row, stream)
        return replace(plan.ends_plan, row=plan)

    return forecast(name, settings.source, settings.split, settings.stream, decide)
