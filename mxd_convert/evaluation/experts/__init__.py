"""Statistics of every expert on a text: activations, examples, and effects on logits."""
