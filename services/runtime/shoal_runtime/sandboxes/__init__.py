"""Sandboxes: the store that clients keep them in, and the controller under which they run."""
