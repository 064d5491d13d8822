"""`mollifier project`: an organization has projects."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from mollifier.cli.output import Json, Record, show, show_all
from mollifier.cli.servers import with_tenants

if TYPE_CHECKING:
    from mollifier.postgres.tenants import Project

app = typer.Typer(no_args_is_help=True, help="Create and list an organization's projects.")

Org = Annotated[str, typer.Option("--org", metavar="ID", help="The organization's id, from `mollifier org list`.")]


@app.command()
def create(
    name: Annotated[str, typer.Argument(help="Any name, as in 'Billing'.")],
    org: Org,
    as_json: Json = False,
) -> None:
    """Create a project in an organization.

    A project groups the environments (prod, staging, ...) of one application.

    For example:

        $ mollifier project create Billing --org org_4f1c
    """
    show(_record(with_tenants(lambda tenants: tenants.create_project(org, name))), as_json=as_json)


@app.command("list")
def list_all(org: Org, as_json: Json = False) -> None:
    """List an organization's projects, oldest first.

    Use it to find a project's id.

    For example:

        $ mollifier project list --org org_4f1c
    """
    projects = with_tenants(lambda tenants: tenants.list_projects(org))
    nothing = f"The organization has no project yet: `mollifier project create NAME --org {org}` makes one."
    show_all([_record(each) for each in projects], as_json=as_json, when_none=nothing)


def _record(project: Project) -> Record:
    return {
        "project_id": project.id,
        "org_id": project.org_id,
        "name": project.name,
        "created_at": project.created_at,
    }
