"""What containerd's transfer service does, as operations of the content service: one module for each concern."""
