"""The terminal application: `quire` without a command. The only part of Quire that knows Textual."""
