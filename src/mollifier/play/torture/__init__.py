"""Torture: a whole system under load whose every part is killed, frozen and cut off, and the books at its end.

In reading order: `plan` says what happens when, `orders` what the callers want meanwhile, both the same for the same seed; `fleet` keeps
the processes, `chaos` carries the plan out, `recovery` watches what a killed worker leaves behind; `callers` send the orders and note
every answer in the `ledger`; `accounts` compare it with the database; `session` goes through all of it, `render` shows what came of it.
"""
