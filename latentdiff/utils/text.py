"""Text that strangers wrote: captions, prompts, metadata. What is not surely text is refused rather than guessed at."""

import codecs
import io
import re
from collections.abc import Iterator
from typing import BinaryIO

# UTF-32's mark begins as that of UTF-16 does, so it is looked for first.
_MARKS = (
    (codecs.BOM_UTF8, "utf-8-sig"),
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)
_UNDECODED = re.compile("[\udc80-\udcff]")  # what "surrogateescape" makes of bytes that are not UTF-8


class NotText(ValueError):
    """Bytes that are no text in an encoding that can be told: the message says which byte."""


def encoding_of(start: bytes) -> str:
    """The encoding that a file's first four bytes name, UTF-8 where they name none."""
    return next((encoding for mark, encoding in _MARKS if start.startswith(mark)), "utf-8")


def decoded(content: bytes) -> str:
    """Text in the encoding that its byte order mark names (UTF-8, UTF-16, UTF-32), else in UTF-8.

    Raises:
        NotText: it is neither; cp1252, Shift-JIS and GBK cannot be told from each other.
    """
    encoding = encoding_of(content[:4])
    try:
        text = content.decode(encoding)
    except UnicodeDecodeError as error:
        raise NotText(_why(error)) from None
    if "\0" in text:
        raise NotText(_nul(text))
    return text


def lines(text: str) -> list[str]:
    r"""The lines of a text, which end at \n, \r\n or \r: `str.splitlines` cuts at U+2028 and seven others, too."""
    return re.split(r"\r\n|\n|\r", text)


class Lines:
    r"""The lines of a stream of any length, with their ends (\n, \r\n or \r), decoded as `decoded` does.

    One that is not UTF-8 ends nothing: it comes with surrogates in the place of the bytes that are none.

    Attributes:
        problem: of the last line that was not text, what is wrong with it; the reader sets it to None again.
    """

    def __init__(self, stream: BinaryIO):
        start = stream.read(4)
        stream.seek(0)
        encoding = encoding_of(start)
        # Elsewhere than in UTF-8 nothing says where the next line starts.
        errors = "surrogateescape" if encoding.startswith("utf-8") else "strict"
        self._text = io.TextIOWrapper(stream, encoding, errors, newline="")
        self.problem: str | None = None

    def __iter__(self) -> Iterator[str]:
        try:
            for line in self._text:
                if found := _UNDECODED.search(line):
                    before = line[: found.start()].encode("utf-8", "surrogateescape")
                    value = line[found.start()].encode("utf-8", "surrogateescape")[0]
                    self.problem = f"it is not text in UTF-8 (at byte {len(before)} of the line, 0x{value:02x})"
                elif "\0" in line:
                    self.problem = _nul(line)
                yield line
        except UnicodeDecodeError as error:
            self.problem = f"{_why(error)}: the rest of the file cannot be read"
            yield ""


def _why(error: UnicodeDecodeError) -> str:
    name = error.encoding.upper().replace("UTF-8-SIG", "UTF-8").removesuffix("-LE").removesuffix("-BE")
    return f"it is not text in {name} (at byte {error.start}, 0x{error.object[error.start]:02x})"


def _nul(text: str) -> str:
    at = len(text[: text.index("\0")].encode("utf-8", "surrogatepass"))
    return f"it is not text (a NUL at byte {at}; UTF-16 needs its byte order mark)"
