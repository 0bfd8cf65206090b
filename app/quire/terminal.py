"""Makes text of documents, file names and models safe to print: it can say anything, not drive the terminal.

Knows control characters and escape sequences; knows nothing of where the text comes from or where it is
shown.
"""

import re

# Whole sequences first, so that no "[31m" is left over; then every control character that remains. String
# sequences (title, clipboard, hyperlink) end within their line: an unfinished one must not swallow the rest
# of a document.
_UNSAFE = re.compile(
    r"(?:\x1b\[|\x9b)[0-?]*[ -/]*[@-~]"  # control sequence: colour, cursor, erase
    r"|(?:\x1b[\]PX^_]|[\x90\x98\x9d-\x9f])[^\x00-\x1f\x7f-\x9f]*(?:\x07|\x1b\\|\x9c)"  # title, clipboard
    r"|\x1b[ -/]+[0-~]|\x1b[0-?`-~]"  # character sets, keypad modes, reset
    r"|[\x00-\x08\x0b-\x1f\x7f-\x9f]"  # C0 except tab and newline, DEL, C1
    r"|[\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069]"  # bidirectional controls: they reorder what is read
    # What has no width and hides in a name. The joiners U+200C and U+200D stay: scripts and emoji need them.
    r"|[\u00ad\u180e\u200b\u2060-\u2065\u206a-\u206f\ufeff\ufff9-\ufffb\U000e0000-\U000e007f]"
)
_SURROGATES = re.compile(r"[\ud800-\udfff]")  # undecodable bytes of file names; no terminal accepts them


def printable(text: str) -> str:
    """The text without escape sequences, control characters (but tab and newline) and what is invisible. Idempotent."""
    return _SURROGATES.sub("\N{REPLACEMENT CHARACTER}", _UNSAFE.sub("", text))


def typed(text: str) -> str:
    """What was typed or pasted, made safe; every kind of line end becomes a newline."""
    return printable(text.replace("\r\n", "\n").replace("\r", "\n"))
