"""The command line's edge: a module per family of commands. They parse and print; what they do is elsewhere.

Nothing heavy is imported before a command runs: `shoal version` and completion must feel instant.
"""
