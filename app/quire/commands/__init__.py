"""The groups of commands, one file each, and what they share. Heavy modules are imported inside the commands."""
