"""Training of the layers on activations of the base model: passes, optimiser, saved state, several processes."""
