"""open → plan → run → commit: plans, the jobs that run them, and the engine that runs their steps."""
