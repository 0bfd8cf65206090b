"""Chunk KV as bytes: codec, file format, store, transfer."""
