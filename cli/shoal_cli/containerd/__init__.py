"""`shoal containerd`: a whole node behind containerd's flags and its configuration file."""
