"""Finding a merge's settings by trials on the user's own questions."""
