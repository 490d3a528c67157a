"""Restart policies: containers that are started again when they have ended, as containerd's restart monitor does it.

`rows` is what is kept of each, `decision` what is to be done with it and when, `start` how it is started again, and
`monitor` who sees to it.
"""
