"""Archives and compression, read from whoever sent them: what processes that unpack and import share. Loads no bus."""
