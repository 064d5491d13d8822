"""`mollifier org`: the customers of the platform."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from mollifier.cli.output import Json, Record, show, show_all
from mollifier.cli.servers import with_tenants

if TYPE_CHECKING:
    from mollifier.postgres.tenants import Organization

app = typer.Typer(no_args_is_help=True, help="Create and list organizations.")


@app.command()
def create(
    name: Annotated[str, typer.Argument(help="Any name, as in 'Acme Inc'.")],
    as_json: Json = False,
) -> None:
    """Create an organization.

    The first step for a new customer; projects, environments and keys follow. `mollifier key create --new-tenant NAME` takes all four
    at once.

    For example:

        $ mollifier org create 'Acme Inc'
    """
    show(_record(with_tenants(lambda tenants: tenants.create_organization(name))), as_json=as_json)


@app.command("list")
def list_all(as_json: Json = False) -> None:
    """List the organizations, oldest first, with their feature flags.

    Use it to find an organization's id, or who is enrolled.

    For example:

        $ mollifier org list
    """
    organizations = with_tenants(lambda tenants: tenants.list_organizations())
    nobody = "There is no organization yet: `mollifier org create NAME` makes one."
    show_all([_record(each) for each in organizations], as_json=as_json, when_none=nobody)


def _record(organization: Organization) -> Record:
    return {
        "org_id": organization.id,
        "name": organization.name,
        "flags": organization.feature_flags,
        "created_at": organization.created_at,
    }
