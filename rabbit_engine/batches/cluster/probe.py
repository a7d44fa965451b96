"""What a machine says of itself before it gets a worker."""

from __future__ import annotations

from dataclasses import replace

from rabbit_engine.batches.cluster.files import settings_of
from rabbit_engine.batches.cluster.order import Failure, Order
from rabbit_engine.checkpoints import HEADERS_ONLY, resolve
from rabbit_engine.cluster import require_ray
from rabbit_engine.model.sent_files import SentFiles, digest
from rabbit_engine.planning.forecast import forecast


def probe(order: Order, files: SentFiles | None = None) -> str | Failure:
    """What identifies the model's files on this machine, or those that it is sent, or why it cannot run the model."""
    try:
        settings, name = settings_of(order), order.model
        if files is not None:
            found = files.headers()
            name, settings = found.name, replace(settings, source=found.source, split=found.split)
        forecast(name, settings.source, settings.split, settings.stream)
        if files is not None:
            return files.digest
        return digest(resolve(name, settings.source, settings.split, reading=HEADERS_ONLY).source)
    except Exception as error:  # noqa: BLE001 - the driver says it
        return Failure(type(error).__name__, str(error), require_ray().util.get_node_ip_address())
