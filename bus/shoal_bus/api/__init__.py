"""The contract: a module per service with its verbs, their requests and replies, and its events' payloads."""
