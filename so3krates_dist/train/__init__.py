"""Training: losses, the DeepSpeed engine, checkpoints, evaluation and the loop that is the story of a run."""
