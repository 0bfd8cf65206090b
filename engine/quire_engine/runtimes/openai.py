"""A server that speaks OpenAI's protocol: what it is sent, and its answer as it comes.

It keeps its own KV, so nothing of what `Runtime` does applies to it. Follows no redirection and uses no proxy: what is
sent goes to the address that was named, or nowhere. Knows nothing of passages, stored KV or settings.
"""

import http.client
import ipaddress
import json
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any, Literal
from urllib.parse import urlsplit

from quire_engine.errors import ModelError, QuireError

_CONNECT_SECONDS = 10.0
_SILENCE_SECONDS = 600.0  # a large prompt on a slow server
_STOP_LOOK_SECONDS = 0.05
_MOST_SAID = 300  # characters of a server's own error
_HERE = "To answer on this computer again: quire config set runtime auto"

Role = Literal["system", "user", "assistant"]
Message = tuple[Role, str]
Ending = Literal["end", "length", "stopped"]


@dataclass(frozen=True)
class Ended:
    """prompt_tokens, cached_tokens: as the server counts; 0 where it does not say. cached: whose KV it had."""

    ending: Ending
    prompt_tokens: int
    cached_tokens: int


@dataclass(frozen=True)
class Server:
    """url: of its API, as in http://localhost:8000/v1.  model: as the server calls it; empty: the first it lists.
    key: sent with every request, if there is one."""

    url: str = ""
    model: str = ""
    key: str = field(default="", repr=False)

    @property
    def host(self) -> str:
        return urlsplit(self.url).netloc

    @property
    def is_this_computer(self) -> bool:
        name = urlsplit(self.url).hostname or ""
        try:
            return name == "localhost" or ipaddress.ip_address(name).is_loopback
        except ValueError:
            return False

    @property
    def statement(self) -> str:
        """What leaves this computer, in one plain sentence."""
        return self._says("with every question the passages found for it and the conversation leave this computer")

    @property
    def statement_of_all(self) -> str:
        """The same of a question for which every passage is read."""
        return self._says("all these passages leave this computer with the question")

    def _says(self, what_leaves: str) -> str:
        if not self.host:
            return "The setting runtime is openai, and no server is named."
        if self.is_this_computer:
            return f"Answers come from the server at {self.host}, on this computer."
        secret = "" if self.url.startswith("https://") else ", unencrypted"
        return f"Answers come from {self.host}: {what_leaves}{secret}."

    def checked(self) -> "Server":
        """Raises ModelError where no server was named."""
        if not self.host:
            raise ModelError(
                "The setting runtime is openai, and no server is named.",
                f"Name it: quire config set openai_url http://localhost:8000/v1. {_HERE}",
            )
        return self

    def models(self) -> list[str]:
        """What it serves. Raises QuireError."""
        with self._asked("GET", "models") as response:
            try:
                return [str(model["id"]) for model in json.loads(response.read())["data"]]
            except (ValueError, KeyError, TypeError) as error:
                raise self._broken("its list of models cannot be read", error) from error

    def complete(
        self, messages: Sequence[Message], most: int, temperature: float, should_stop: Callable[[], bool]
    ) -> Iterator[str | Ended]:
        """The answer piece by piece, then Ended. Raises QuireError; a broken connection is told from an end."""
        wanted = {
            "model": self.model or self._first_model(),
            "messages": [{"role": role, "content": text} for role, text in messages],
            "max_tokens": most,
            "temperature": temperature,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        ending: Ending | None = None
        usage: dict[str, Any] = {}
        try:
            with self._asked("POST", "chat/completions", wanted, should_stop) as response:
                for told in _events(response):
                    if should_stop():
                        break
                    if "error" in told:
                        raise self._broken(_said(json.dumps(told)))
                    usage = told.get("usage") or usage
                    for choice in told.get("choices") or ():
                        if text := (choice.get("delta") or {}).get("content"):
                            yield str(text)
                        if reason := choice.get("finish_reason"):
                            ending = "length" if reason == "length" else "end"
        except (OSError, http.client.HTTPException, ValueError, AttributeError) as error:
            if not should_stop():
                raise self._broken("the connection broke", error) from error
        if ending is None and not should_stop():
            raise self._broken("the answer broke off")
        cached = (usage.get("prompt_tokens_details") or {}).get("cached_tokens") or 0
        yield Ended(ending or "stopped", int(usage.get("prompt_tokens") or 0), int(cached))

    def _first_model(self) -> str:
        if names := self.models():
            return names[0]
        raise self._broken("it lists no model")

    @contextmanager
    def _asked(
        self, method: str, path: str, body: object = None, should_stop: Callable[[], bool] = lambda: False
    ) -> Iterator[http.client.HTTPResponse]:
        """One request. As soon as should_stop() turns true the connection is cut, whatever it waits for."""
        parts = urlsplit(self.url)
        kind = http.client.HTTPSConnection if parts.scheme == "https" else http.client.HTTPConnection
        connection = kind(parts.netloc, timeout=_CONNECT_SECONDS)
        done = threading.Event()
        try:
            try:
                connection.connect()
            except OSError as error:
                message = f"The server at {self.host} does not answer: {error.strerror or error}."
                raise QuireError(message, f"Is it running? {_HERE}", repr(error)) from error
            connection.sock.settimeout(_SILENCE_SECONDS)
            cutter = threading.Thread(target=_cut, args=(connection.sock, should_stop, done), daemon=True)
            cutter.start()
            headers = {"Content-Type": "application/json", "Accept": "application/json"}
            headers |= {"Authorization": f"Bearer {self.key}"} if self.key else {}
            base = parts.path.rstrip("/") or "/v1"
            connection.request(method, f"{base}/{path}", None if body is None else json.dumps(body), headers)
            response = connection.getresponse()
            if response.status != 200:
                raise self._refused(response.status, _said(response.read().decode("utf-8", "replace")))
            yield response
        finally:
            done.set()
            connection.close()

    def _refused(self, status: int, said: str) -> QuireError:
        key = "Put its key into the environment variable QUIRE_OPENAI_KEY, and start Quire again."
        hint = {
            401: key,
            403: key,
            404: "Check openai_url, which often ends in /v1, and openai_model: quire config",
            400: "It may hold less than this model does. Ask with fewer passages (--context-tokens).",
        }.get(status, f"Try again later. {_HERE}")
        return QuireError(f"The server at {self.host} refused the question ({status}): {said}.", hint)

    def _broken(self, what: str, error: Exception | None = None) -> QuireError:
        message = f"No answer from the server at {self.host}: {what}."
        return QuireError(message, f"Ask again. {_HERE}", repr(error) if error else "")


def _events(response: http.client.HTTPResponse) -> Iterator[dict[str, Any]]:
    """The objects of a stream of server-sent events, until the one that says it is done."""
    while line := response.readline():
        field_name, _, value = line.decode("utf-8").strip().partition(":")
        if field_name != "data":
            continue
        if value.strip() == "[DONE]":
            return
        told = json.loads(value)
        if isinstance(told, dict):
            yield told


def _cut(connection: Any, should_stop: Callable[[], bool], done: threading.Event) -> None:
    """Ends a connection that somebody may be waiting for."""
    while not done.wait(_STOP_LOOK_SECONDS):
        if should_stop():
            with suppress(OSError):
                connection.shutdown(2)
            return


def _said(body: str) -> str:
    """What an error's body says, shortly."""
    try:
        told = json.loads(body)
        error = told.get("error", told.get("detail", told))  # FastAPI says detail
        text = str(error.get("message", error) if isinstance(error, dict) else error)
    except (ValueError, AttributeError):
        text = body
    return " ".join(text.split())[:_MOST_SAID].rstrip(".") or "without a word"
