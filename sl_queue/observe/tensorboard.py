"""Event files as TensorBoard reads them, written by hand: records of protobuf with checksums.

A record is its length (8 bytes, little-endian), a masked CRC-32C of those, the event, and a masked CRC-32C of it. Of
an event the fields are: 1 wall time, 2 step, 3 file version, 5 summary; of a summary's value: 1 tag, 2 number, 8
tensor, 9 metadata.
"""

import os
import re
import socket
import struct
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from sl_queue.observe.scalars import Scalar
from sl_queue.observe.sink import TrackerDown

VERSION = b"brain.Event:2"
MASK = 0xA282EAD8
POLYNOMIAL = 0x82F63B78  # of CRC-32C, reflected
TEXT = 7  # the type of a tensor of texts


class TensorBoard:
    """A folder `DIR/JOB-RUN` with a file for each process. Mutable: the file is made when the run is known."""

    def __init__(self, folder: Path, job: str) -> None:
        self._folder, self._job = folder, job
        self._path: Path | None = None

    def begin(self, run: str, parameters: Mapping[str, str]) -> Mapping[str, int]:
        folder = self._folder / f"{self._job}-{run}"
        try:
            folder.mkdir(parents=True, exist_ok=True)
            known = _known(folder)
            name = f"events.out.tfevents.{int(time.time())}.{socket.gethostname()}.{os.getpid()}.sl_queue"
            self._path = folder / name
            first = _record(_event(time.time(), None, _bytes_field(3, VERSION)))
            if not known:
                first += _record(_event(time.time(), 0, _text("job", _table(parameters))))
            self._append(first)
        except OSError as error:
            raise TrackerDown(f"{folder} cannot be written ({error.strerror})") from None
        return known

    def write(self, scalars: Sequence[Scalar]) -> None:
        events = (_event(each.at_s, each.step, _number(each.name, each.value)) for each in scalars)
        try:
            self._append(b"".join(map(_record, events)))
        except OSError as error:
            raise TrackerDown(f"{self._path} cannot be written ({error.strerror})") from None

    def end(self, phase: str) -> None:
        """Leave the file as it is."""

    def _append(self, body: bytes) -> None:
        """Write whole records; a write that fails in between is taken back, so that the next follows a whole one."""
        assert self._path is not None
        with self._path.open("ab") as file:
            size = file.tell()
            try:
                file.write(body)
                file.flush()
            except OSError:
                os.truncate(self._path, size)
                raise


def _known(folder: Path) -> dict[str, int]:
    """Return the newest step by tag, of all that earlier processes wrote here."""
    newest: dict[str, int] = {}
    for path in sorted(folder.glob("*.tfevents.*.sl_queue")):
        for tag, step in steps_in(path.read_bytes()):
            newest[tag] = max(step, newest.get(tag, -1))
    return newest


def steps_in(body: bytes) -> Iterator[tuple[str, int]]:
    """Read (tag, step) of each number in an event file of ours, up to where a crash may have torn it."""
    start = 0
    while start + 12 <= len(body):
        (length,) = struct.unpack_from("<Q", body, start)
        event = body[start + 12 : start + 12 + length]
        checksum = body[start + 12 + length : start + 16 + length]
        if len(checksum) < 4 or checksum != _masked(event):
            return
        start += 16 + length
        fields = dict(_fields(event))
        summary, step = fields.get(5), fields.get(2, 0)
        if isinstance(summary, bytes) and isinstance(step, int):
            yield from ((tag, step) for tag in _tags(summary))


def _tags(summary: bytes) -> Iterator[str]:
    """Yield the tags of the numbers in a summary."""
    for _, value in _fields(summary):
        inner = dict(_fields(value)) if isinstance(value, bytes) else {}
        tag = inner.get(1)
        if 2 in inner and isinstance(tag, bytes):
            yield tag.decode()


# Records and protobuf -----------------------------------------------------------------------------------------------


def _record(event: bytes) -> bytes:
    length = struct.pack("<Q", len(event))
    return length + _masked(length) + event + _masked(event)


def _masked(data: bytes) -> bytes:
    checksum = crc32c(data)
    return struct.pack("<I", ((checksum >> 15 | checksum << 17) + MASK) & 0xFFFFFFFF)


def _crc_table() -> tuple[int, ...]:
    table = []
    for number in range(256):
        for _ in range(8):
            number = number >> 1 ^ (POLYNOMIAL if number & 1 else 0)
        table.append(number)
    return tuple(table)


_TABLE = _crc_table()


def crc32c(data: bytes) -> int:
    """Return the checksum of Castagnoli."""
    checksum = 0xFFFFFFFF
    for byte in data:
        checksum = checksum >> 8 ^ _TABLE[(checksum ^ byte) & 0xFF]
    return checksum ^ 0xFFFFFFFF


def _event(at_s: float, step: int | None, what: bytes) -> bytes:
    return b"\x09" + struct.pack("<d", at_s) + (b"" if step is None else b"\x10" + _varint(step)) + what


def _number(tag: str, value: float) -> bytes:
    return _summary(_bytes_field(1, tag.encode()) + b"\x15" + struct.pack("<f", value))


def _text(tag: str, text: str) -> bytes:
    tensor = b"\x08" + _varint(TEXT) + _bytes_field(8, text.encode())
    plugin = _bytes_field(1, _bytes_field(1, b"text"))
    return _summary(_bytes_field(1, tag.encode()) + _bytes_field(8, tensor) + _bytes_field(9, plugin))


def _summary(value: bytes) -> bytes:
    return _bytes_field(5, _bytes_field(1, value))


def _bytes_field(number: int, body: bytes) -> bytes:
    return _varint(number << 3 | 2) + _varint(len(body)) + body


def _varint(value: int) -> bytes:
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)


def _fields(body: bytes) -> Iterator[tuple[int, "bytes | int"]]:
    """Read the fields of a message that we wrote."""
    place = 0
    while place < len(body):
        key, place = _read_varint(body, place)
        match key & 7:
            case 0:
                value, place = _read_varint(body, place)
                yield key >> 3, value
            case 2:
                length, place = _read_varint(body, place)
                yield key >> 3, body[place : place + length]
                place += length
            case wire:
                size = 8 if wire == 1 else 4
                yield key >> 3, body[place : place + size]
                place += size


def _read_varint(body: bytes, place: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = body[place]
        value |= (byte & 0x7F) << shift
        place, shift = place + 1, shift + 7
        if not byte & 0x80:
            return value, place


def _table(parameters: Mapping[str, str]) -> str:
    """Write parameters as TensorBoard's text plugin shows a table."""
    plain = {name: re.sub(r"[|\n]", " ", value) for name, value in parameters.items()}
    rows = (f"| {name} | {value} |" for name, value in plain.items())
    return "\n".join(("| key | value |", "| --- | --- |", *rows))
