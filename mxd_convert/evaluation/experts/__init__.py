"""What every expert does on a text: activations, examples, effects."""
