"""What was asked: YAML or flags, checked, with presets and parameters."""
