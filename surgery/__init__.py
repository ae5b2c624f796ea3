"""Model surgery on saved weight files: extract, merge, unmerge and export adapters, exactly."""
