"""The state of library and cache at a glance: what `quire status` shows."""

from dataclasses import dataclass
from pathlib import Path

from quire import elsewhere, render
from quire.library import StoredDocument
from quire.session import Session
from quire.terminal import printable


@dataclass(frozen=True)
class Overview:
    """passages, cached: distinct passages in the library, and how many of them have their KV on disk. disk_bytes: of KV
    of all models and conversations, limit_bytes its budget (0: none), written_bytes what was ever written.  leaves:
    what leaves this computer with a question; empty where no server answers."""

    roots: tuple[Path, ...]
    documents: int
    skipped: tuple[StoredDocument, ...]
    passages: int
    cached: int
    tokens: int
    disk_bytes: int
    limit_bytes: int
    written_bytes: int
    model: str
    runtime: str
    leaves: str
    reuse_off: str
    finds_by: str

    def lines(self) -> list[str]:
        lines = [f"Model      {printable(self.model)}", f"Runtime    {self.runtime}"]
        if self.leaves:
            lines.append(f"           {printable(self.leaves)}")
        elif self.reuse_off:
            lines.append(f"           {printable(self.reuse_off)} Questions are answered by full prefill.")
        lines.append(f"Finding    {self.finds_by}")
        lines += [f"Folder     {render.path_from_here(root)}" for root in self.roots]
        if not self.roots:
            lines.append("Folder     none yet. Add one: quire add ~/notes")
        lines.append(f"Documents  {self.documents}")
        lines.append(f"Passages   {self.passages} ({self.tokens} tokens), {self.cached} cached")
        budget = f", of at most {render.size(self.limit_bytes)}" if self.limit_bytes else ""
        written = f"{render.size(self.written_bytes)} written so far"
        lines.append(f"On disk    {render.size(self.disk_bytes)} of KV{budget}; {written}")
        lines += [f"Skipped    {render.path_from_here(d.path)}: {d.reason}. {d.remedy}" for d in self.skipped]
        return lines

    def as_json(self) -> render.Json:
        return {
            "folders": [str(root) for root in self.roots],
            "documents": self.documents,
            "passages": self.passages,
            "cached": self.cached,
            "tokens": self.tokens,
            "disk_bytes": self.disk_bytes,
            "limit_bytes": self.limit_bytes,
            "written_bytes": self.written_bytes,
            "model": self.model,
            "runtime": self.runtime,
            "leaves": self.leaves,
            "reuse_off": self.reuse_off,
            "finding": self.finds_by,
            "skipped": [{"path": str(d.path), "reason": d.reason, "remedy": d.remedy} for d in self.skipped],
        }


def of(session: Session) -> Overview:
    documents = session.library.documents()
    engine, shelf = session.engine, session.shelf
    shelf.refresh()
    progress, usage = shelf.progress(), shelf.usage()
    return Overview(
        roots=tuple(session.library.roots()),
        documents=sum(document.state == "indexed" for document in documents),
        skipped=tuple(document for document in documents if document.state == "skipped"),
        passages=progress.total,
        cached=progress.done,
        tokens=progress.tokens_total,
        disk_bytes=usage.disk_bytes,
        limit_bytes=usage.limit_bytes,
        written_bytes=usage.total_written_bytes,
        model=engine.model_name,
        runtime=engine.choice.runtime,
        leaves=elsewhere.leaves(session.settings),
        reuse_off=engine.known_reuse_off,
        finds_by=session.finds_by,
    )
