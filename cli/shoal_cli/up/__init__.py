"""A whole node in the foreground: nats-server and the five services, as processes of their own."""
