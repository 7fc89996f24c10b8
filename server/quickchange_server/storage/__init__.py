"""The server's SQL database: SQLite by default, PostgreSQL for several replicas."""
