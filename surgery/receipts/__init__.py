"""What an output says of its own making: receipts and undo files."""
