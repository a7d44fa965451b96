"""Clusters of Ray on one machine, for tests and benchmarks: nodes in network namespaces with links and memory of their own."""
