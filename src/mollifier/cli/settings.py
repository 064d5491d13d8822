"""`mollifier settings`: what is in effect, and where it comes from."""

from __future__ import annotations

from mollifier.cli.output import Json, print_json, show_rows, tell_warnings


def settings(as_json: Json = False) -> None:
    """Show every setting with its value, where the value comes from, and what it does.

    Reads the environment as `serve` and `worker` do, and stops with exit code 2 and the variable's name where they would. Run it where
    they run, before they do. Passwords and tokens are masked.

    For example:

        $ mollifier settings
        $ MOLLIFIER_TRIP_THRESHOLD=50 mollifier settings --json
    """
    from mollifier import config

    with tell_warnings():
        variables = config.describe()
    if as_json:
        print_json(variables)
    else:
        rows = [(each.name, each.value or "-", each.source, each.help) for each in variables]
        show_rows(rows, header=("setting", "value", "source", "what it does"))
