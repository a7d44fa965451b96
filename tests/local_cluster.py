"""A Ray cluster of several nodes on this machine, for the tests of one file."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

_NODE = {"num_cpus": 1, "object_store_memory": 80_000_000}


class LocalCluster:
    """Nodes that are processes of this machine; the first is the head, and the driver's."""

    def __init__(self, cluster: Any) -> None:
        self._cluster = cluster
        self.nodes: list[Any] = []

    @property
    def address(self) -> str:
        return str(self._cluster.address)

    def add(self) -> None:
        self.nodes.append(self._cluster.add_node(**_NODE))
        self._cluster.wait_for_nodes()

    def end(self, node: Any) -> None:
        self.nodes.remove(node)
        self._cluster.remove_node(node, allow_graceful=False)


@contextmanager
def local_cluster(nodes: int) -> Iterator[LocalCluster]:
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    os.environ.setdefault("RAY_AUTH_MODE", "disabled")
    import ray
    from ray.cluster_utils import Cluster

    cluster = Cluster(initialize_head=True, head_node_args={**_NODE, "include_dashboard": False})
    made = LocalCluster(cluster)
    try:
        for _ in range(nodes - 1):
            made.add()
        yield made
    finally:
        ray.shutdown()
        cluster.shutdown()
