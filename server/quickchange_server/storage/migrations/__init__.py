"""Alembic migrations: `env.py` runs those in `versions`, which has one branch for each domain."""
