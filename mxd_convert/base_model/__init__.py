"""The pretrained model: loading, the location of each family's MLPs, and replacing them by layers and back."""
