"""The pretrained model: loading, where each family keeps its MLPs, and putting layers in and out."""
