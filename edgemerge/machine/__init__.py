"""What this machine tells of itself, and where its user keeps what can be made again."""
