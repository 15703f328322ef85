"""The plan of a conversion before any work: sizes, memory, disk, time."""
