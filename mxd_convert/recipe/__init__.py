"""What the user asked for: the settings of a run, and how they are read from YAML, `--set` and presets."""
