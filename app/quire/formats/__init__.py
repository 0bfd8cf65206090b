"""One module per family of formats: bytes of a file into text. They run in the parser process alone (child.py)."""
