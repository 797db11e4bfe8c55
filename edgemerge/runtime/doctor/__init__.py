"""What this machine can run, and what holds it back."""
