"""A Ray cluster of several nodes on this machine, for the tests of one file."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from ray_token import use_ray_token

_NODE = {"num_cpus": 1, "object_store_memory": 80_000_000}


class LocalCluster:
    """Nodes that are processes of this machine; the first is the head, and the driver's."""

    def __init__(self, cluster: Any) -> None:
        self._cluster = cluster
        self.nodes: list[Any] = []

    @property
    def address(self) -> str:
        return str(self._cluster.address)

    def add(self, environment: Mapping[str, str] | None = None) -> None:
        self.nodes.append(self._cluster.add_node(**_NODE, env_vars=dict(environment or {})))
        self._cluster.wait_for_nodes()

    def end(self, node: Any) -> None:
        self.nodes.remove(node)
        self._cluster.remove_node(node, allow_graceful=False)


@contextmanager
def local_cluster(nodes: int = 1, environments: Sequence[Mapping[str, str]] = ()) -> Iterator[LocalCluster]:
    """A head and more nodes, so that there are `nodes`, or one for each of the environments, the head's first."""
    use_ray_token()
    import ray
    from ray.cluster_utils import Cluster

    own = [dict(one) for one in environments] or [{}] * nodes
    head = {**_NODE, "include_dashboard": False, "env_vars": own[0]}
    cluster = Cluster(initialize_head=True, head_node_args=head)
    made = LocalCluster(cluster)
    try:
        for environment in own[1:]:
            made.add(environment)
        yield made
    finally:
        ray.shutdown()
        cluster.shutdown()
