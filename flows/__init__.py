"""Prefect flows over `pipeline`, and the command line."""
