"""Quire: chat with your own documents, first word at once."""

__version__ = "0.1.0"
