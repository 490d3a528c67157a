"""Images to and from registries: pulls, pushes, and what they have unpacked."""
