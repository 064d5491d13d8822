"""The whole flow in a simulated world: a virtual clock, seeded chance, faults of every kind, and the specification as checks.

What runs is the production code, `Mollifier` as it joins its parts, in several processes. In the place of servers are the models in
`tests/model/`: of the buffer's server, which the model-based test holds against the real one, and of the run engine, which passes the
conformance suite. A seed is one world, played the same way every time. In reading order:

    invariants.py   the specification, sentence by sentence
    plan.py         what a seed stands for: settings, tenants, requests, faults
    world.py        one seed, played
    loop.py         an event loop whose time is a number
    network.py      messages that take a while, or are lost
    server.py       the buffer's server, and a process's client of it
    engine.py       the run engine, and a process's way to it
    process.py      an API or a worker, which is killed, stopped, restarted
    callers.py      who asks, gives up, and asks again
    history.py      what has happened; facts.py what follows from it; watch.py looks at it after every step
    planted.py      bugs that have to be found
    __main__.py     thousands of seeds: `make simulate`
"""
