"""Registries: the interface that pulls and pushes need of one (`resolver`), and two that have it.

`http` speaks the OCI distribution protocol, with one `transport` for each of a registry's `hosts`, whose answers are
read by `headers`; `auth`, `credentials` and `tokens` are how it is let in, `upload` is one blob's way there. `layout`
is a directory. `registries` is what a service has of all of them.
"""
