"""Records of how an output was made: receipts and undo files."""
