"""Alembic's folder: `env.py` runs the migrations in `versions`, one branch a domain."""
