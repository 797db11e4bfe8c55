"""What will be done, to the last byte, before any tensor data is read."""
