"""5. The run engine on PostgreSQL: runs, their jobs, and the tenants they belong to.

| module | holds |
|---|---|
| `database` | the connection pool, and what "cannot be reached" means |
| `tables`, `migrations/`, `migrate`, `job_schema` | the schema, and bringing it up to date |
| `engine` | `PostgresRunEngine`, with `rows`, `slots`, `creation`, `holders`, `debounce` and `listing` as its parts |
| `tenants`, `api_keys`, `authentication`, `flags`, `catalog` | organizations to environments; their keys; whose key this is; flags; tasks |
| `worker`, `execution`, `invocation`, `upkeep`, `jobs` | executing runs: the process, one run, one call, what time brings, procrastinate |
"""
