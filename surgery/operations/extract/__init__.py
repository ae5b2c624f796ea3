"""extract and spectrum: what a tuned model changed, as factors."""
