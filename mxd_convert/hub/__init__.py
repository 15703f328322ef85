"""The Hub: its client, repositories, and what is published. With `data` and `base_model` the only room that reaches the network."""
