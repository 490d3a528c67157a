"""Commands without Python's start: the node's process, which has everything loaded, forks one for each command.

Loading the command line takes a third of a second, ten times what most commands do. So `shoal` first asks the node on
its machine: it sends arguments, environment, streams and working directory (`client`), and a fork of the node's process
becomes that command (`server`), as if it had been started where it was called: same session of the bus, same exit
code, same signals. Where there is no node, or it can't be the same (another version, namespace or user, a terminal in
the background), the command runs in the process that was called, as it would without.

    shoal ── connects ──> shoal up ── forks ──> the command
      └───── signals, by pidfd ───────────────────┘ └── exit code, on the connection

The one dies with the other: a killed caller ends the command, and a killed command its caller. Neither needs the node
any more once the command has begun.
"""
