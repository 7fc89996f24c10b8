"""What a folder holds and what would be served of it, with no store and no server."""
