"""Training: one loop; the methods' losses, objectives and recipes; checkpoints; several processes."""
