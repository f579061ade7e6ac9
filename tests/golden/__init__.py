"""Comparison of the project's results with stored ones: `python -m tests.golden`."""
