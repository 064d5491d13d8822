"""`mollifier key`: the API keys by which environments authenticate."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from mollifier.cli.output import Json, Record, note, show, show_all
from mollifier.cli.servers import with_tenants

if TYPE_CHECKING:
    from mollifier.postgres.api_keys import ApiKey

app = typer.Typer(no_args_is_help=True, help="Create, list, rotate and revoke API keys.")

KeyId = Annotated[
    str, typer.Argument(metavar="KEY_ID", help="The key's id, from `mollifier key list`; not the key itself.")
]
Env = Annotated[str, typer.Option("--env", metavar="ID", help="The environment's id, from `mollifier env list`.")]


@app.command()
def create(
    env: Annotated[str | None, typer.Option("--env", metavar="ID", help="The environment the key is for.")] = None,
    new_tenant: Annotated[
        str | None,
        typer.Option(
            "--new-tenant", metavar="NAME", help="Make an organization, a project and an environment for it, too."
        ),
    ] = None,
    as_json: Json = False,
) -> None:
    """Create an API key; it is shown this once.

    Clients send it as `Authorization: Bearer KEY`. For an environment that exists give its id; for a new customer --new-tenant makes
    organization, project, environment and key in one go.

    For example:

        $ mollifier key create --env env_77d2
        $ mollifier key create --new-tenant 'Acme Inc' --json
    """
    if (env is None) == (new_tenant is None):
        raise typer.BadParameter("give either --env ID or --new-tenant NAME")
    if new_tenant is not None:
        tenant = with_tenants(lambda tenants: tenants.create_tenant(new_tenant))
        record: Record = {
            "org_id": tenant.org_id,
            "project_id": tenant.project_id,
            "env_id": tenant.env_id,
            "api_key": tenant.api_key,
        }
    else:
        made = with_tenants(lambda tenants: tenants.create_key(env or ""))
        record = {"key_id": made.key.id, "env_id": made.key.env_id, "api_key": made.secret}
    show(record, as_json=as_json)
    note("Keep the key now: only its hash is stored.")


@app.command("list")
def list_all(env: Env, as_json: Json = False) -> None:
    """List an environment's keys, revoked and expired ones too, oldest first.

    Shows the beginning of each key, which is enough to tell them apart, and when it was used last, give or take half a minute.

    For example:

        $ mollifier key list --env env_77d2
    """
    keys = with_tenants(lambda tenants: tenants.list_keys(env))
    nothing = f"The environment has no key yet: `mollifier key create --env {env}` makes one."
    show_all([_record(each) for each in keys], as_json=as_json, when_none=nothing)


@app.command()
def rotate(
    key: KeyId,
    env: Env,
    overlap: Annotated[
        str, typer.Option("--overlap", metavar="DURATION", help="How long the old key goes on working, at most 90d.")
    ] = "1d",
    as_json: Json = False,
) -> None:
    """Create a key in the place of another, which goes on working until the overlap has passed.

    The new key works at once and is shown this once. Move your clients to it and watch `last_used_at` of the old one in `mollifier key
    list`; `mollifier key revoke` ends it early, `--overlap 0s` at once. A key is rotated once: after that, rotate the newer one.

    For example:

        $ mollifier key rotate key_03fe --env env_77d2
        $ mollifier key rotate key_03fe --env env_77d2 --overlap 2h30m --json
    """
    from mollifier.durations import parse_duration

    try:
        duration = parse_duration(overlap)
    except ValueError as error:
        raise typer.BadParameter(str(error), param_hint="--overlap") from error
    rotation = with_tenants(lambda tenants: tenants.rotate_key(env, key, duration))
    created, replaced = rotation.created, rotation.replaced
    record: Record = {
        "key_id": created.key.id,
        "env_id": created.key.env_id,
        "api_key": created.secret,
        "replaced_key_id": replaced.id,
        "replaced_expires_at": replaced.expires_at,
    }
    show(record, as_json=as_json)
    note("Keep the key now: only its hash is stored.")


@app.command()
def revoke(
    key: KeyId,
    env: Env,
    as_json: Json = False,
) -> None:
    """Revoke a key for good.

    Requests with it are answered 401 within seconds. To replace a key that is in use, `mollifier key rotate` it instead.

    For example:

        $ mollifier key revoke key_03fe --env env_77d2
    """
    show(_record(with_tenants(lambda tenants: tenants.revoke_key(env, key))), as_json=as_json)


def _record(key: ApiKey) -> Record:
    return {
        "key_id": key.id,
        "env_id": key.env_id,
        "prefix": key.prefix,
        "created_at": key.created_at,
        "last_used_at": key.last_used_at,
        "expires_at": key.expires_at,
        "revoked_at": key.revoked_at,
    }
