"""Clients on other machines: the server's cohort, and the client's side."""
