"""The model's files for machines that lack them: those of the driver, if it has them."""

from __future__ import annotations

from collections.abc import Mapping
from types import ModuleType
from typing import Any

from rabbit_engine.batches.cluster.order import Order
from rabbit_engine.checkpoints import Resolution
from rabbit_engine.model import sent_files
from rabbit_engine.model.sent_files import SentFiles, find_here, settings_for
from rabbit_engine.model.settings import LoadSettings

ABSENT = tuple(kind.__name__ for kind in sent_files.ABSENT)
"""The errors of a machine that does not have the model."""


def own_model(ray: ModuleType, order: Order) -> Resolution | None:
    """The model on the driver's machine; None if its files are not there, or if the driver is no machine of the cluster."""
    return None if ray.util.client.ray.is_connected() else sent_files.own_model(order.model, order.loading)


def located(order: Order, files: SentFiles | None) -> tuple[str, Mapping[str, Any]]:
    """What loads the model on this machine: a name and keywords. Its own files, or those that are fetched now."""
    if files is None or find_here(order.model, order.loading, files.description.commit) is not None:
        return order.model, order.loading
    found = files.whole()
    return found.name, {**order.loading, **found.keywords()}


def settings_of(order: Order) -> LoadSettings:
    """The settings by which a worker loads the model, without a draft."""
    return settings_for(order.loading)
