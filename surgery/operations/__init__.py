"""The verbs. Each module plans one, runs it and reports."""
