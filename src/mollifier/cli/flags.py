"""`mollifier flags`: feature flags, of one organization or of everybody."""

from __future__ import annotations

from typing import Annotated

import msgspec
import typer

from mollifier.cli.output import Json, note, print_json, show_rows
from mollifier.cli.servers import with_global_flags, with_tenants
from mollifier.flags import ORG_FLAG
from mollifier.model import FeatureFlags

app = typer.Typer(
    no_args_is_help=True, help="Get, set and unset feature flags; mollifierEnabled enrols an organization."
)

Org = Annotated[
    str | None,
    typer.Option(
        "--org", metavar="ID", help="The organization whose own flags are meant; without it, the global ones."
    ),
]
Name = Annotated[str, typer.Argument(help=f"The flag's name, as in {ORG_FLAG}.")]


@app.command()
def get(
    name: Annotated[str | None, typer.Argument(help="One flag; without it, all of them.")] = None,
    org: Org = None,
    as_json: Json = False,
) -> None:
    """Show the flags that are set, or one of them.

    An organization's own flag wins over the global one, which wins over the default (off). What is shown is what is set in the place
    asked for. Exits 1 when the named flag is not set there.

    For example:

        $ mollifier flags get --org org_4f1c
        $ mollifier flags get mollifierEnabled
    """
    if org is None:
        flags = with_global_flags(lambda store: store.refresh())
    else:
        flags = with_tenants(lambda tenants: tenants.get_flags(org))
    if name is None:
        _show(flags, as_json=as_json)
    elif name in flags:
        print_json(flags[name])
    else:
        where = "globally" if org is None else f"for {org}"
        note(f"mollifier: {name} is not set {where}; `mollifier flags set` sets it.")
        raise typer.Exit(1)


@app.command("set")
def set_flag(
    name: Name,
    value: Annotated[str, typer.Argument(help="Any JSON: true, false, 5, '\"text\"'.")],
    org: Org = None,
    as_json: Json = False,
) -> None:
    """Set a flag; running API processes follow within 5 seconds.

    With `mollifierEnabled true` an organization is enrolled: the overflow of its environments goes to the buffer. `false` takes the step
    back, and holds against a global `true`; `unset` leaves it to the global flag.

    For example:

        $ mollifier flags set mollifierEnabled true --org org_4f1c
        $ mollifier flags set mollifierEnabled false
    """
    values = {name: _parsed(name, value)}
    if org is None:
        flags = with_global_flags(lambda store: store.set(values))
    else:
        flags = with_tenants(lambda tenants: tenants.set_flags(org, values))
    if name != ORG_FLAG:
        note(f"mollifier: {name} is kept, and means nothing to Mollifier, whose flag is {ORG_FLAG}.")
    _show(flags, as_json=as_json)


@app.command()
def unset(name: Name, org: Org = None, as_json: Json = False) -> None:
    """Remove a flag: the global one then decides for an organization, the default (off) for everybody.

    Nothing changes when it is not set.

    For example:

        $ mollifier flags unset mollifierEnabled --org org_4f1c
    """
    if org is None:
        flags = with_global_flags(lambda store: store.unset(name))
    else:
        flags = with_tenants(lambda tenants: tenants.unset_flag(org, name))
    _show(flags, as_json=as_json)


def _parsed(name: str, value: str) -> object:
    try:
        parsed: object = msgspec.json.decode(value)
    except msgspec.DecodeError as error:
        example = "true, false, a number, or a text in double quotes: '\"text\"'"
        raise typer.BadParameter(f"{value!r} is not JSON. Write {example}.", param_hint="VALUE") from error
    if name == ORG_FLAG and not isinstance(parsed, bool):
        raise typer.BadParameter(f"{ORG_FLAG} is true or false, not {value}.", param_hint="VALUE")
    return parsed


def _show(flags: FeatureFlags, *, as_json: bool) -> None:
    if as_json:
        print_json(flags)
    elif flags:
        show_rows([(name, msgspec.json.encode(value).decode()) for name, value in sorted(flags.items())])
    else:
        note("No flag is set.")
