"""What the tests of the levels share: the levels, the probe as a workload, snapshots to find leaks by."""
