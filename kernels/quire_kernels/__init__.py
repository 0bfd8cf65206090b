"""Pure array functions: the specification of every kernel, in plain NumPy. No models, no files."""
