"""`mollifier env`: a project has environments, and an environment triggers tasks."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from mollifier.cli.output import Json, Record, show, show_all
from mollifier.cli.servers import with_tenants

if TYPE_CHECKING:
    from mollifier.postgres.tenants import TenantEnvironment

app = typer.Typer(no_args_is_help=True, help="Create and list a project's environments.")

Project = Annotated[
    str, typer.Option("--project", metavar="ID", help="The project's id, from `mollifier project list`.")
]


@app.command()
def create(
    project: Project,
    name: Annotated[str, typer.Argument(help="Of a-z, 0-9 and inner hyphens, as in 'staging'.")] = "prod",
    as_json: Json = False,
) -> None:
    """Create an environment in a project.

    Runs, keys and idempotency belong to an environment, and its trigger rate is watched by itself. Give it an API key next.

    For example:

        $ mollifier env create staging --project proj_91ab
    """
    show(_record(with_tenants(lambda tenants: tenants.create_environment(project, name))), as_json=as_json)


@app.command("list")
def list_all(project: Project, as_json: Json = False) -> None:
    """List a project's environments, oldest first.

    Use it to find an environment's id.

    For example:

        $ mollifier env list --project proj_91ab
    """
    environments = with_tenants(lambda tenants: tenants.list_environments(project))
    nothing = f"The project has no environment yet: `mollifier env create NAME --project {project}` makes one."
    show_all([_record(each) for each in environments], as_json=as_json, when_none=nothing)


def _record(environment: TenantEnvironment) -> Record:
    return {
        "env_id": environment.id,
        "project_id": environment.project_id,
        "name": environment.name,
        "created_at": environment.created_at,
    }
