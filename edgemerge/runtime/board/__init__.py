"""What the board tells of itself: processor, memory, heat, power, storage."""
