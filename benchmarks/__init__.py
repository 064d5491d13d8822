"""Measurements of what Mollifier costs. `make bench` runs them all; see README.md."""
