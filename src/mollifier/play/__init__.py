"""Playing arrivals against the real HTTP API and closing the books on what became of them.

In reading order: `trace` reads arrivals (`bursts` makes some up), `player` says when a call leaves, `client` makes it, `evidence`
asks the system what it did, `books` compares the two, `session` runs all of it, `render` shows it.
"""
