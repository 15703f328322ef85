"""What ships inside every checkpoint: two flat files that need nothing but torch and transformers."""
