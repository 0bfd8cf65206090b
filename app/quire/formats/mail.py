"""Mail: one message (eml) or a mailbox (mbox), each with subject, sender, day and text; attachments by name only."""

import re
from email import message_from_bytes, policy
from email.errors import MessageError
from email.message import EmailMessage, MIMEPart

from quire.formats import web
from quire.formats.base import Parsed, Unreadable, Writer

_SEPARATOR = re.compile(rb"(?m)(?:\A|(?<=\n)\r?\n)From [^\r\n]*\r?\n")
_SHOWN = ("From", "To", "Cc", "Date")
_MOST_HEADER = 500  # characters: a message may go to very many
_REFUSALS = (MessageError, LookupError, ValueError, AttributeError, TypeError, IndexError)


def parse(data: bytes) -> Parsed:
    return _parsed([data])


def parse_mailbox(data: bytes) -> Parsed:
    ends = [match.span() for match in _SEPARATOR.finditer(data)]
    if not ends or ends[0][0] > 0:
        raise Unreadable("not a mailbox, whatever its name says", "Give it the ending of what it is.")
    starts = [end for _, end in ends]
    stops = [start for start, _ in ends[1:]] + [len(data)]
    return _parsed([data[start:stop] for start, stop in zip(starts, stops, strict=True)])


def _parsed(messages: list[bytes]) -> Parsed:
    writer = Writer()
    read = 0
    for number, data in enumerate(messages, 1):
        writer.mark("message", number)
        message = message_from_bytes(data, policy=policy.default)
        try:
            _message(writer, message)
            read += 1
        except _REFUSALS:  # one damaged message is no reason to lose the others
            continue
    if not read or writer.empty:
        raise Unreadable("no message can be read", "Export it anew from your mail program.")
    return writer.parsed()


def _message(writer: Writer, message: EmailMessage) -> None:
    body = message.get_body(("plain", "html"))
    text = _text(body) if body is not None else ""
    if not (text.strip() or message["Subject"] or message["From"]):
        raise MessageError("nothing in it")
    writer.heading(1, str(message["Subject"] or "(no subject)"))
    about = [f"{name}: {str(message[name])[:_MOST_HEADER]}" for name in _SHOWN if message[name]]
    writer.paragraph("\n".join(" ".join(line.split()) for line in about))
    if body is not None and body.get_content_type() == "text/html":
        web.write(writer, text)
    else:
        for paragraph in re.split(r"\n[ \t]*\n", text.replace("\r\n", "\n")):
            writer.paragraph(paragraph)
    for part in message.iter_attachments():
        if name := part.get_filename():
            writer.paragraph(f"Attached: {name}")


def _text(body: MIMEPart) -> str:
    try:
        return str(body.get_content())
    except LookupError:  # an unknown character set
        payload = body.get_payload(decode=True)
        return payload.decode("utf-8", "replace") if isinstance(payload, bytes) else ""
