"""The mount manager: mounts that a `Mount` list needs made before it can be mounted (`shoal_bus.api.runtime.mounts`).

`plan` says which those are, `templates`, `directories` and `filesystems` are the transforms, `places` mounts and takes
away, `rows` is what the database knows, `manager` answers the verbs, `collecting` is its part in garbage collection.
"""

from shoal_runtime.mount_manager.manager import MountManager, lock_of

__all__ = ["MountManager", "lock_of"]
