"""Texts: documents read from files and the Hub, labelled documents, and packed blocks of tokens on disk."""
