"""open → plan → run → commit: plans, the jobs that carry them out, and the engine that runs their steps."""
