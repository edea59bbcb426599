"""Training: configuration, state, one step, and the loop around it."""
