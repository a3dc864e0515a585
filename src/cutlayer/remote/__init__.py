"""Clients on other machines: the server's cohort, and what runs where the data are."""
