"""What costs time or memory over bytes, in processes of its own: archives read and written, layers compressed anew.

`worker` is the process, `pool` what runs it for the service, and a module each what it does. Everything a worker
imports is light, and knows nothing of the bus.
"""
