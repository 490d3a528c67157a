"""Image records, and what is read of an image: its documents, its platforms, what of it is here."""
