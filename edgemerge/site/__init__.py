"""What a device keeps: its models with their records, which of them is current, and a log."""
