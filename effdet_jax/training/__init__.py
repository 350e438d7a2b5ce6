"""State, step, optimiser and devices: what a training loop is made of."""
