"""Make the roles and databases of Prefect and MLflow in the PostgreSQL that PGHOST, PGPORT, PGUSER and PGPASSWORD name.

Safe to run again: what exists stays, and passwords become those of now.
"""

from __future__ import annotations

import os

import psycopg2
from psycopg2 import sql

ROLES = {"prefect": ("prefect",), "mlflow": ("mlflow", "mlflow_auth")}


def main() -> None:
    """One role a service, which owns its databases and sees no others."""
    connection = psycopg2.connect(dbname="postgres")
    connection.autocommit = True
    with connection.cursor() as cursor:
        for role, databases in ROLES.items():
            name, password = sql.Identifier(role), sql.Literal(os.environ[f"{role.upper()}_DB_PASSWORD"])
            cursor.execute("SELECT 1 FROM pg_roles WHERE rolname = %s", (role,))
            verb = sql.SQL("ALTER" if cursor.fetchone() else "CREATE")
            cursor.execute(sql.SQL("{} ROLE {} LOGIN PASSWORD {}").format(verb, name, password))
            for database in databases:
                cursor.execute("SELECT 1 FROM pg_database WHERE datname = %s", (database,))
                if not cursor.fetchone():
                    cursor.execute(sql.SQL("CREATE DATABASE {} OWNER {}").format(sql.Identifier(database), name))
                cursor.execute(sql.SQL("REVOKE CONNECT ON DATABASE {} FROM PUBLIC").format(sql.Identifier(database)))
    connection.close()


if __name__ == "__main__":
    main()
