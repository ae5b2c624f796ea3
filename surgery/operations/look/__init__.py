"""inspect, diff and prove: show what files hold, and check whether two graphs are the same program."""
