"""What a file was made of, and who vouches for it."""
