"""Whether two graphs are the same program, and what each costs."""
