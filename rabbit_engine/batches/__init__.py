"""A batch over a file: requests in, one a line, and answers out; killed at any moment and started again, it goes on."""

from rabbit_engine.batches.choices import Choices
from rabbit_engine.batches.cluster import Order, Workers
from rabbit_engine.batches.lines import Task
from rabbit_engine.batches.progress import BatchProgress, BatchReport
from rabbit_engine.batches.run import BatchJob, batch

__all__ = ["BatchJob", "BatchProgress", "BatchReport", "Choices", "Order", "Task", "Workers", "batch"]
