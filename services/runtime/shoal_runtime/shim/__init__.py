"""The supervisor that outlives the service: a zygote that forks shims, and the shim of one container.

Standard library only, and little of that: what is imported here is memory of every node and time of every start.
"""
