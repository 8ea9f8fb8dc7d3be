"""SAE checkpoints: one file for each public format, one registry."""
