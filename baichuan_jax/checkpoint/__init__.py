"""Checkpoints on shared storage and on the hosts' own disks."""
