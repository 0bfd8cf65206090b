"""The parser process: reused, limited, closed to everything but bytes in and text out, and no harm when it dies."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import file_makers as make
from quire.formats.base import Unreadable
from quire.parsing import Limits, NotNow, Parser

PAGE = b"<h1>Tea</h1><p>Steep it.</p>"
STUCK = Limits(cpu_s=1, wall_s=60)

# Pretends to be the module of a format, so that a test says what its parser does.
_HARMFUL = """
import sys, types
harmful = types.ModuleType("quire.formats.web")
exec({code!r}, harmful.__dict__)
sys.modules["quire.formats.web"] = harmful
from quire.formats import child
child.main(int(sys.argv[1]))
"""


class Harmful(Parser):
    """A parser process whose HTML parser is this code."""

    def __init__(self, code: str, limits: Limits | None = None) -> None:
        super().__init__(limits)
        self.code = code
        self.started = 0

    def _started(self) -> "subprocess.Popen[bytes]":
        self.started += 1
        command = [sys.executable, "-P", "-c", _HARMFUL.format(code=self.code), str(self._limits.memory_bytes)]
        pipe = subprocess.PIPE
        return subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=subprocess.DEVNULL, start_new_session=True)


def reason(parser: Parser, format: str = "html", data: bytes = PAGE) -> str:
    with pytest.raises(Unreadable) as caught:
        parser.parse(format, data)
    assert caught.value.remedy
    return caught.value.reason


def test_what_could_never_fit_its_memory_is_not_sent_to_it() -> None:
    with Parser(Limits(memory_bytes=len(PAGE))) as parser:
        assert "needs too much memory" in reason(parser)
        assert parser._process is None


def process_of(parser: Parser) -> "subprocess.Popen[bytes]":
    assert parser._process
    return parser._process


def test_one_process_reads_many_files_and_failures_do_not_end_it() -> None:
    with Parser() as parser:
        parser.parse("html", PAGE)
        process = process_of(parser)
        assert process.pid != os.getpid()
        assert reason(parser, "pdf", make.pdf([[]])) == "no text; it looks scanned"
        assert parser.parse("docx", make.word([("Normal", "words")])).text == "words"
        assert process_of(parser) is process
    assert process.poll() is not None


def test_a_process_that_was_killed_between_two_files_is_replaced() -> None:
    with Parser() as parser:
        parser.parse("html", PAGE)
        os.kill(process_of(parser).pid, signal.SIGKILL)
        assert parser.parse("html", PAGE).text == "# Tea\n\nSteep it."


def test_a_crash_is_told_and_the_next_file_is_read() -> None:
    with Harmful("import os\ndef parse(data):\n    os.abort()") as parser:
        assert reason(parser) == "damaged: its reader crashed"
        assert parser.parse("eml", b"Subject: x\n\ny").text == "# x\n\ny"


def test_a_crash_after_other_files_is_tried_once_more_in_a_fresh_process() -> None:
    code = "import os\ndef parse(data):\n    os.abort()"
    parser = Harmful(code)
    with parser:
        parser.parse("eml", b"Subject: x\n\ny")
        assert reason(parser) == "damaged: its reader crashed"
        assert parser.started == 2


def test_a_kill_from_outside_is_no_fault_of_the_file() -> None:
    with Harmful("import time\ndef parse(data):\n    time.sleep(3600)") as parser, pytest.raises(NotNow):
        parser.parse("html", PAGE, lambda: process_of(parser).kill())


def test_an_endless_computation_is_ended_by_its_processor_time() -> None:
    with Harmful("def parse(data):\n    while True: pass", STUCK) as parser:
        assert reason(parser) == "takes too long to read"
        assert parser.parse("eml", b"Subject: x\n\ny").text == "# x\n\ny"


def test_a_parser_that_waits_for_ever_is_ended_from_outside() -> None:
    with Harmful("import time\ndef parse(data):\n    time.sleep(3600)", Limits(wall_s=0.3)) as parser:
        assert reason(parser) == "takes too long to read"


def test_memory_is_limited() -> None:
    code = "def parse(data):\n    return b'x' * (4 << 30)"
    with Harmful(code, Limits(memory_bytes=1 << 30)) as parser:
        assert reason(parser) == "needs too much memory"


@pytest.mark.parametrize(
    ("code", "expected"),
    [
        ("def parse(data):\n    return parse(data)", "too deeply nested"),
        ("def parse(data):\n    raise ZeroDivisionError", "damaged (ZeroDivisionError)"),
        ("def parse(data):\n    raise ImportError", "the library that reads it is missing"),
    ],
)
def test_mistakes_of_a_parser_become_reasons(code: str, expected: str) -> None:
    with Harmful(code) as parser:
        assert reason(parser) == expected


def test_what_a_parser_prints_disturbs_nothing() -> None:
    code = (
        "import os\nfrom quire.formats.base import Parsed\n"
        "def parse(data):\n    print('noise'); os.write(1, b'noise'); return Parsed('text', ())"
    )
    with Harmful(code) as parser:
        assert parser.parse("html", PAGE).text == "text"


@pytest.mark.parametrize(
    "attempt",
    [
        "open({secret!r}).read()",
        "open({there!r}, 'w').write('x')",
        "__import__('os').open({secret!r}, 0)",
        "__import__('subprocess').run(['/bin/cat', {secret!r}])",
        "__import__('os').system('touch ' + {there!r})",
        "__import__('socket').socket()",
        "__import__('os').fork()",
        "__import__('os').remove({secret!r})",
        "__import__('os').kill(1, 0)",
        "__import__('os').rename({secret!r}, {there!r})",
    ],
)
def test_a_parser_reaches_nothing_but_its_bytes(attempt: str, tmp_path: Path) -> None:
    secret, there = tmp_path / "secret.xml", tmp_path / "there"
    secret.write_text("<a>secret</a>")
    code = f"def parse(data):\n    {attempt.format(secret=str(secret), there=str(there))}"
    with Harmful(code) as parser:
        assert reason(parser) == "damaged (PermissionError)"
    assert secret.exists()
    assert not there.exists()


def test_somebody_waits_and_may_give_up() -> None:
    waited = 0

    def waiting() -> None:
        nonlocal waited
        waited += 1
        if waited == 3:
            raise KeyboardInterrupt

    with Harmful("import time\ndef parse(data):\n    time.sleep(3600)") as parser:
        with pytest.raises(KeyboardInterrupt):
            parser.parse("html", PAGE, waiting)
        assert parser._process is None
        assert parser.parse("eml", b"Subject: x\n\ny").text == "# x\n\ny"


def test_the_process_ends_with_the_one_that_started_it() -> None:
    code = "from quire.parsing import Parser; p = Parser(); p.parse('html', b'<p>x'); print(p._process.pid, flush=True)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    pid = int(done.stdout)
    deadline = time.monotonic() + 30
    while _runs(pid) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert not _runs(pid)


def _runs(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    stat = Path(f"/proc/{pid}/stat")
    return not stat.exists() or stat.read_text().rpartition(")")[2].split()[0] != "Z"


def test_nothing_of_the_parsers_is_loaded_here() -> None:
    names = {"docx", "pptx", "openpyxl", "lxml", "pypdfium2", "selectolax"}
    code = f"import quire.indexer, sys; print(sorted({names} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60).stdout == "[]\n"
