"""Images to and from archives, and converted, by processes of their own."""
