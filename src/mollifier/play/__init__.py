"""Playing arrivals against the real HTTP API, and closing the books on what became of them.

In reading order: `trace` reads arrivals (`bursts` makes some up) and `replay` and `demo` turn them into calls; `player` says
when a call leaves, `client` and `wire` make it; `evidence`, `journal` and `runs` ask the system what it did; `books` compares;
`sampling` does with held runs what their callers may, through `run_api`, and `outage` takes the database away meanwhile;
`session` goes through all of it, on a `stage` set up for it or with a `remote` system; `render` shows what came of it.
"""
