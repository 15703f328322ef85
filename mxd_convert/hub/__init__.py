"""The Hugging Face Hub: client, repositories, published files. Only this package, `data` and `base_model` access the network."""
