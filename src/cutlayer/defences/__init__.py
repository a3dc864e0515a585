"""What clients do to smashed data before it leaves them, and how they watch the server."""
