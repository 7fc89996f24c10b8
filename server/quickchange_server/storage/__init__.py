"""What must outlive the process: one SQL database, SQLite by default, PostgreSQL for replicas."""
