"""Training of the layers on activations of the base model: passes over groups of layers, optimiser, saved state, several processes."""
