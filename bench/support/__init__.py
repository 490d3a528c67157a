"""What the benchmarks share: a scratch world that is undone, containerd and shoal side by side, and their figures."""
