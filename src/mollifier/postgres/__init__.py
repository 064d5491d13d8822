"""5. The run engine on PostgreSQL: runs, their jobs, and the tenants they belong to."""
