"""scripts/bench: the emulated link, the servers, the mounts, the workloads, the report."""
