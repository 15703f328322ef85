"""Fidelity of a converted model, its reliance on experts, and steering."""
