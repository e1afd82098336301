"""What stays on the disk: whole checkpoints, and the trained model."""
