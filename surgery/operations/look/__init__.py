"""inspect, diff and prove: what files hold, and whether two graphs are one program."""
