"""Training: objectives, the DeepSpeed engine, checkpoints, the loop, and ``run.train`` that composes them."""
