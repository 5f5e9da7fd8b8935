"""Files, tables and displays of a run."""
