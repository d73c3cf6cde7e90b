"""The routes, one file for each address."""
