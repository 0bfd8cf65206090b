"""Where answers come from when the runtime is openai: which server, and what leaves this computer.

Knows settings; knows nothing of how a server is spoken to, nor of what is asked.
"""

import os
from typing import TYPE_CHECKING

from quire.config import KEY_VARIABLE, Settings

if TYPE_CHECKING:
    from quire_engine.runtimes.openai import Server

_OPENAI = "openai"


def server_of(settings: Settings) -> "Server":
    """The server that answers when the runtime is openai; its key is read from the environment alone."""
    from quire_engine.runtimes.openai import Server

    return Server(settings.openai_url, settings.openai_model, os.environ.get(KEY_VARIABLE, ""))


def leaves(settings: Settings, whole: bool = False) -> str:
    """What leaves this computer with every question, in a sentence; empty where no server answers. whole: with a
    question to all documents."""
    if settings.runtime != _OPENAI:
        return ""
    server = server_of(settings)
    return server.statement_of_all if whole else server.statement
