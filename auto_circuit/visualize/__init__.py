"""Results for people: tables and the report."""
