"""shoal's runtime service: containers, tasks, and the shims that supervise them."""
