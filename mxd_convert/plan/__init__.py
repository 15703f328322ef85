"""What a recipe comes to before any work: sizes, memory, disk, time."""
