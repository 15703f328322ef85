"""Texts: documents read from files and the Hub, labelled documents, and packed blocks of tokens on disk."""

from mxd_convert.data.documents import read_documents

__all__ = ["read_documents"]
