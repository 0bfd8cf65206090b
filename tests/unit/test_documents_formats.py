"""What every format says, and where: files as their own programs' libraries write them, read by the parsers themselves.

That this happens in a process of its own, and what becomes of harmful files, other tests say.
"""

from collections.abc import Callable

import pytest

import file_makers as make
from quire.formats import book, mail, notebook, pdf, sheets, slides, web, word
from quire.formats.base import Lines, Mark, Parsed, Unreadable, Writer, place


def reason(parse: Callable[[bytes], Parsed], data: bytes) -> str:
    with pytest.raises(Unreadable) as caught:
        parse(data)
    assert caught.value.remedy
    return caught.value.reason


def where(parsed: Parsed, text: str) -> str | Lines:
    """Where the line that holds this text stands in the file."""
    [line] = [number for number, line in enumerate(parsed.text.split("\n"), 1) if text in line]
    return place(parsed.marks, line, line)


# PDF


def test_a_pdf_gives_paragraphs_headings_and_pages() -> None:
    parsed = pdf.parse(make.prose_pages(5))
    assert "# Part 3 of the harbour\n\nFirst paragraph 3, line 0.\nFirst paragraph 3, line 1." in parsed.text
    assert "line 2.\n\nSecond paragraph 3, line 0." in parsed.text
    assert where(parsed, "Second paragraph 4, line 0.") == "page 4"
    lines = parsed.text.split("\n")
    assert place(parsed.marks, lines.index("First paragraph 2, line 0."), len(lines)) == "pages 2-5"


def test_running_titles_are_kept_once_and_page_numbers_not_at_all() -> None:
    parsed = pdf.parse(make.prose_pages(6))
    assert parsed.text.count("The Grey Point Report") == 1
    assert not [line for line in parsed.text.split("\n") if line.strip().isdigit()]
    assert parsed.text.count("of the harbour") == 6, "a number inside of a line is part of what it says"


def test_running_titles_of_left_and_right_pages_with_numbers_are_found() -> None:
    pages = [
        [(750.0, 9.0, f"{n} GREY POINT" if n % 2 else f"THE HARBOUR {n}"), (700.0, 11.0, f"What page {n} says.")]
        for n in range(1, 9)
    ]
    text = pdf.parse(make.pdf(pages)).text
    assert (text.count("GREY POINT"), text.count("THE HARBOUR")) == (1, 1)
    assert text.count("What page") == 8


def test_equal_first_lines_of_two_pages_stay() -> None:
    page = [(700.0, 11.0, "1 2 3"), (686.0, 11.0, "4 5 6")]
    assert pdf.parse(make.pdf([page, page])).text.count("1 2 3") == 2


def test_a_page_that_was_scanned_does_not_hide_the_others() -> None:
    parsed = pdf.parse(make.pdf([[(700.0, 11.0, "first")], [], [(700.0, 11.0, "third")]]))
    assert (where(parsed, "first"), where(parsed, "third")) == ("page 1", "page 3")


def test_text_that_looks_like_markup_stays_text() -> None:
    parsed = pdf.parse(make.pdf([[(700.0, 11.0, "# no heading"), (686.0, 11.0, "~~~")]]))
    assert parsed.text == "\\# no heading\n\\~~~"


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (make.encrypted_pdf(), "encrypted: it needs a password"),
        (make.pdf([[], []]), "no text; it looks scanned"),
        (make.pdf([]), "damaged, or not a PDF"),
        (b"%PDF-1.7\nnonsense", "damaged, or not a PDF"),
        (b"", "damaged, or not a PDF"),
    ],
)
def test_pdfs_that_give_no_text(data: bytes, expected: str) -> None:
    assert reason(pdf.parse, data) == expected


# Office


def test_a_word_file_gives_headings_lists_and_tables() -> None:
    data = make.word(
        [("Title", "Guide"), ("Normal", "Words first."), ("Heading 2", "Brewing"), ("List Bullet", "Boil")],
        [["tea", "minutes"], ["green|white", "2"]],
    )
    parsed = word.parse(data)
    assert parsed.text == (
        "# Guide\n\nWords first.\n\n## Brewing\n- Boil\n\n| tea | minutes |\n| --- | --- |\n| green\\|white | 2 |"
    )
    assert where(parsed, "Boil") == "paragraph 4"
    assert where(parsed, "green") == "paragraph 5"


def test_tracked_changes_in_word_read_as_accepted() -> None:
    body = (
        "<w:p><w:r><w:t>It takes </w:t></w:r><w:ins><w:r><w:t>four</w:t></w:r></w:ins>"
        "<w:del><w:r><w:delText>nine</w:delText></w:r></w:del><w:r><w:t xml:space='preserve'> minutes</w:t></w:r></w:p>"
        "<w:sdt><w:sdtContent><w:p><w:r><w:t>In a control.</w:t></w:r></w:p></w:sdtContent></w:sdt>"
    )
    assert word.parse(make.word_of(body)).text == "It takes four minutes\n\nIn a control."


def test_slides_give_titles_texts_and_notes() -> None:
    parsed = slides.parse(make.slides([("Plans", "One\nTwo", "Say it slowly"), ("", "Only text", "")]))
    assert parsed.text == "## Plans\n\nOne\n\nTwo\n\nNotes: Say it slowly\n\n## Slide 2\n\nOnly text"
    assert where(parsed, "Only text") == "slide 2"


def test_sheets_give_rows_and_cells() -> None:
    parsed = sheets.parse(
        make.sheets({"Budget": [["item", "cost"], ["tea", 3.0], [None], ["cups", 4.5, "blue"]], "Empty": []})
    )
    assert parsed.text == "# Budget\n\n| item | cost |\n| --- | --- |\n| tea | 3 |\n| cups | 4.5 | blue |"
    assert where(parsed, "cups") == "Budget!A4:C4"
    assert place(parsed.marks, 3, 6) == "Budget!A1:C4"


def test_a_wide_row_that_holds_little_is_no_row_of_bars() -> None:
    row = [None] * 400 + ["far"]
    assert sheets.parse(make.sheets({"A": [["near"], row]})).text.endswith("\n| far |")


def test_two_sheets_are_named_both() -> None:
    parsed = sheets.parse(make.sheets({"A": [["x"]], "B": [["y"]]}))
    assert place(parsed.marks, 1, len(parsed.text.split("\n"))) == "A!A1 to B!A1"


@pytest.mark.parametrize(
    ("parse", "data", "expected"),
    [
        (word.parse, b"PK\x03\x04broken", "damaged"),
        (word.parse, make.zipped({"inner.zip": make.zipped({"a": "b"})}), "not a Word document"),
        (word.parse, make.word([]), "no text"),
        (slides.parse, make.word([]), "not a presentation"),
        (slides.parse, make.slides([]), "no text"),
        (sheets.parse, make.sheets({"A": []}), "no cell"),
        (
            word.parse,
            b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1" + "EncryptedPackage".encode("utf-16-le"),
            "password",
        ),
        (word.parse, b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1 old", "before 2007"),
    ],
)
def test_office_files_that_give_no_text(parse: Callable[[bytes], Parsed], data: bytes, expected: str) -> None:
    assert expected in reason(parse, data)


# Web, books, mail, notebooks

PAGE = b"""<html><head><title>The title</title><script>no()</script></head>
<body><nav>menu</nav>
<h1>Tea</h1>
<p>Steep it
for <b>four</b> minutes.<br>No longer.</p>
<ul><li>green<ul><li>sencha</li></ul></li></ul>
<pre>a = 1
  b</pre>
<table><tr><th>kind</th><th>min</th></tr>
<tr><td>white</td><td>2</td></tr></table>
<table><tr><td><h2>Inside</h2><p>of a layout</p></td></tr></table>
</body></html>"""


def test_a_page_gives_its_structure_and_the_lines_of_its_source() -> None:
    parsed = web.parse(PAGE)
    assert parsed.text == (
        "# Tea\n\nSteep it for four minutes.\nNo longer.\n- green\n  - sencha\n\n```\na = 1\n  b\n```\n\n"
        "| kind | min |\n| --- | --- |\n| white | 2 |\n\n## Inside\n\nof a layout"
    )
    assert where(parsed, "# Tea") == Lines(3, 3)
    assert where(parsed, "sencha") == Lines(6, 6)
    assert where(parsed, "white") == Lines(10, 10)
    assert where(parsed, "of a layout") == Lines(11, 11)


def test_only_the_main_part_of_a_page_is_read_where_it_names_one() -> None:
    assert web.parse(b"<title>T</title><header>site</header><main><p>text</p></main><footer>f").text == "# T\n\ntext"


@pytest.mark.parametrize(
    ("data", "text"),
    [
        ("<p>grüße".encode(), "grüße"),
        (b"<meta charset=iso-8859-1><p>gr\xfc\xdfe", "grüße"),
        (b"<p>gr\xfc\xdfe", "grüße"),
        ("<p>grüße".encode("utf-16"), "grüße"),
        (b"<meta charset=nonsense><p>plain", "plain"),
        (b"<p>a &amp; &lt;b&gt;", "a & <b>"),
    ],
)
def test_characters_of_pages(data: bytes, text: str) -> None:
    assert web.parse(data).text == text


def test_a_page_of_scripts_gives_no_text() -> None:
    assert reason(web.parse, b"<script>render()</script><div id=root></div>") == "no text"


def test_a_very_deep_page_is_read() -> None:
    assert web.parse(b"<div>" * 20_000 + b"deep").text == "deep"


def test_a_book_is_read_in_its_order() -> None:
    parsed = book.parse(make.book(["<h1>One</h1><p>first</p>", "<h1>Two</h1><p>second</p>"]))
    assert parsed.text == "# One\n\nfirst\n\n# Two\n\nsecond"
    assert where(parsed, "second") == "section 2"


def test_a_protected_book_is_refused_and_one_with_hidden_fonts_is_not() -> None:
    protection = '<encryption><EncryptionMethod Algorithm="{}"/></encryption>'
    name = "META-INF/encryption.xml"
    fonts = protection.format("http://www.idpf.org/2008/embedding")
    assert book.parse(make.book(["<p>x</p>"], {name: fonts})).text == "# t\n\nx"
    locked = make.book(["<p>x</p>"], {name: protection.format("aes128-cbc")})
    assert "DRM" in reason(book.parse, locked)


def test_a_book_reads_nothing_outside_of_its_archive() -> None:
    items = "<manifest><item id='a' href='../../../../etc/passwd'/></manifest><spine><itemref idref='a'/></spine>"
    assert "no text" in reason(book.parse, make.book([], {"OEBPS/p.opf": f"<package>{items}</package>"}))


MAIL = (
    b"Subject: =?utf-8?q?Gr=C3=BC=C3=9Fe?=\nFrom: Ida <ida@example.org>\nTo: you\nMIME-Version: 1.0\n"
    b"Date: Mon, 1 Jan 2024 10:00:00 +0000\nContent-Type: multipart/mixed; boundary=B\n\n"
    b"--B\nContent-Type: text/plain; charset=iso-8859-1\n\nTea for f\xfcnf.\n\n# not a heading\n\n"
    b"--B\nContent-Type: application/pdf; name=menu.pdf\n"
    b"Content-Disposition: attachment; filename=menu.pdf\nContent-Transfer-Encoding: base64\n\nAAAA\n--B--\n"
)


def test_a_message_gives_subject_sender_text_and_attachments() -> None:
    assert mail.parse(MAIL).text == (
        "# Grüße\n\nFrom: Ida <ida@example.org>\nTo: you\nDate: Mon, 01 Jan 2024 10:00:00 +0000\n\n"
        "Tea for fünf.\n\n\\# not a heading\n\nAttached: menu.pdf"
    )


def test_a_mailbox_gives_its_messages_and_one_damaged_message_takes_no_other_along() -> None:
    second = b"Subject: Two\nContent-Type: text/html\n\n<p>Hello <b>there</b></p>\n>From here\n"
    broken = b"Content-Type: text/plain; charset=\xff\n\n"
    parsed = mail.parse_mailbox(b"From a\n" + MAIL + b"\nFrom b\n" + broken + b"\nFrom c\n" + second)
    assert "# Two\n\nHello there" in parsed.text
    assert (where(parsed, "Hello there"), where(parsed, "Tea for")) == ("message 3", "message 1")
    assert "not a mailbox" in reason(mail.parse_mailbox, b"Dear diary")


def test_a_notebook_gives_text_code_and_what_it_printed() -> None:
    parsed = notebook.parse(
        make.notebook(
            [
                {"cell_type": "markdown", "source": ["# Plan\n", "first"]},
                {
                    "cell_type": "code",
                    "source": "print(1)",
                    "outputs": [
                        {"output_type": "stream", "text": ["1\n"]},
                        {"output_type": "display_data", "data": {"image/png": "AAAA", "text/plain": "<Figure>"}},
                        {"output_type": "error", "ename": "ValueError", "evalue": "no"},
                    ],
                },
            ]
        )
    )
    assert parsed.text == "# Plan\nfirst\n\n```python\nprint(1)\n```\n\n```\n1\n<Figure>\nValueError: no\n```"
    assert where(parsed, "print(1)") == "cell 2"


@pytest.mark.parametrize("data", [b"{}", b"[1]", b'{"cells": 3}', b"not json", b'{"cells": [{"source": 1}]}'])
def test_what_is_no_notebook(data: bytes) -> None:
    assert reason(notebook.parse, data) == "damaged, or not a notebook"


# Writing


def test_what_no_text_holds_is_left_out() -> None:
    writer = Writer()
    writer.paragraph("a\0b\r\nc\x0cd\ud800\n\n\n e")
    writer.code("``` inside", "")
    assert writer.parsed().text == "ab\nc\nd?\n e\n\n````\n``` inside\n````"


def test_a_text_that_grows_without_end_is_refused() -> None:
    writer = Writer()
    for _ in range(20):
        writer.paragraph("x" * 999_999)
    with pytest.raises(Unreadable, match="million characters"):
        writer.paragraph("x" * 999_999)


def test_places() -> None:
    marks = [Mark(1, "page", "1", "1"), Mark(5, "page", "2", "2"), Mark(9, "page", "3", "3")]
    assert [place(marks, *lines) for lines in ((1, 4), (4, 5), (5, 20))] == ["page 1", "pages 1-2", "pages 2-3"]
    assert place([], 3, 4) == Lines(3, 4)
