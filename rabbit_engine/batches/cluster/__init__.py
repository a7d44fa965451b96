"""A batch over the machines of a Ray cluster: Ray Data hands blocks of lines to workers, each with a model of its own."""

from rabbit_engine.batches.cluster.order import Order, Workers
from rabbit_engine.batches.cluster.run import answer_on_cluster

__all__ = ["Order", "Workers", "answer_on_cluster"]
