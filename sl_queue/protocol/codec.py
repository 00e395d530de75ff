"""Messages as bytes: one msgpack document whose last element is the tensor as `bin`.

    [version, run, generation, kind, sender, receiver, step, index, committed, description, data]

`description` is [dtype, shape, digest of row ids] of a tensor, with its packing as a fourth where protocol/wire made it
shorter, and nil for reports and commands, whose `data` is a msgpack map. The header is packed by msgpack and joined
with the raw bytes; decoding reads the header and views the rest, so a tensor is copied once when it is encoded and not
at all when it is decoded. Any msgpack reader can read it.

What a peer sent is never trusted: sizes are checked against the bytes that are here before anything is allocated.
"""

import struct
from dataclasses import dataclass
from typing import Annotated, Any, Final

import msgpack
from pydantic import Field, TypeAdapter, ValidationError

from sl_queue.errors import LocalProtocolError, RemoteProtocolError
from sl_queue.protocol.addressing import objection
from sl_queue.protocol.control import Command, Message, Report, Status
from sl_queue.protocol.messages import (
    BEFORE_FIRST_STEP,
    Activation,
    Gradient,
    Header,
    Kind,
    Masked,
    MicroBatch,
    Payload,
    Role,
    kinds_between,
)
from sl_queue.protocol.topology import Topology

VERSION: Final = 1
ITEM_BYTES: Final = {"float64": 8, "float32": 4, "float16": 2, "bfloat16": 2, "int8": 1}
SCALE_BYTES: Final = 4  # of a row of narrower numbers
MAX_RANK: Final = 16  # of a tensor: rows and the axes of the cut
MAX_TENSOR_BYTES: Final = 2**32 - 1  # of a bin 32
MAX_HEADER_BYTES: Final = 4096
MAX_CONTROL_BYTES: Final = 8 * 1024 * 1024  # earlier versions sent all epochs when they joined
MAX_CONTROL_ITEMS: Final = 50_000  # in one list: epochs of a history; what does not fit is refused in milliseconds
_FIELDS: Final = 11
_KINDS: Final = {kind.value: kind for kind in Kind}
_UNREADABLE: Final = (ValueError, TypeError, msgpack.UnpackException, RecursionError)
_ON_THE_WIRE: Final = {"rollback_steps": "bases"}  # of a start: as the first version calls it
_HERE: Final = {there: here for here, there in _ON_THE_WIRE.items()}
OVERHEAD_BYTES: Final = MAX_HEADER_BYTES  # how much larger than its tensor a message may be


class AnotherVersion(RemoteProtocolError):
    """A message in another version of this format; `speaks` is that version."""

    def __init__(self, speaks: object, own: object = VERSION, what: str = "protocol", where: str = "") -> None:
        super().__init__(f"{where}{what} version {speaks!r:.20}; this program speaks {own}")
        self.speaks = f"{what} {speaks!r:.20}, this program speaks {own}"


class Unreadable(RemoteProtocolError):
    """A message of which only the header can be read."""

    def __init__(self, header: Header, problem: str) -> None:
        super().__init__(problem)
        self.header = header


_reports: TypeAdapter[Report] = TypeAdapter(Annotated[Report, Field(discriminator="type")])
_commands: TypeAdapter[Command | Status] = TypeAdapter(Annotated[Command | Status, Field(discriminator="type")])


@dataclass(frozen=True, slots=True)
class Terms:
    """The messages that `receiver` takes of `sender`; one without a tensor has at most `control_bytes`."""

    sender: str
    receiver: str
    roles: tuple[Role, Role]
    kinds: frozenset[Kind]
    control_bytes: int = MAX_CONTROL_BYTES

    @staticmethod
    def between(topology: Topology, sender: str, receiver: str, control_bytes: int = MAX_CONTROL_BYTES) -> "Terms":
        """Return what `receiver` takes of `sender` in this job."""
        roles = topology.role_of(sender), topology.role_of(receiver)
        return Terms(sender, receiver, roles, kinds_between(*roles), control_bytes)

    def require_header(self, header: Header) -> None:
        """Raise RemoteProtocolError for a message of another sender, to another receiver, or of a kind not allowed."""
        if header.sender != self.sender:
            raise RemoteProtocolError(f"says it is from {header.sender!r:.100}, but came from {self.sender!r}")
        if header.receiver != self.receiver:
            raise RemoteProtocolError(f"is for {header.receiver!r:.100}, but came to {self.receiver!r}")
        if header.kind in self.kinds:
            return
        if header.kind is Kind.COMMAND:
            raise RemoteProtocolError(f"a command from {self.sender!r}; only the scheduler commands")
        raise RemoteProtocolError(f"{header.kind} from {self.sender!r}, who sends none")

    def require(self, message: Message) -> None:
        """Raise RemoteProtocolError for a report or command that is not for the one to say to the other."""
        problem = objection(message, *self.roles)
        if problem is not None:
            raise RemoteProtocolError(problem)


def encode(header: Header, message: Message) -> bytes:
    """Return the bytes of a message. Raises LocalProtocolError if it is too large to be one."""
    description: tuple[Any, ...] | None
    match message:
        case Activation(_, payload) | Gradient(_, payload) | Masked(_, payload):
            packing = (payload.packing,) if payload.packing else ()
            description, data = (payload.dtype, payload.shape, payload.rows, *packing), payload.data
        case _:
            description, data = None, msgpack.packb(_fields_of(message), default=_fields)
    head = msgpack.packb(
        [
            VERSION,
            header.run,
            header.generation,
            header.kind.value,
            header.sender,
            header.receiver,
            header.micro_batch.step,
            header.micro_batch.index,
            header.committed,
            description,
            b"",
        ]
    )
    size = data.nbytes if isinstance(data, memoryview) else len(data)
    if size > MAX_TENSOR_BYTES:
        raise LocalProtocolError(f"a {header.kind} of {size} bytes; a message carries at most {MAX_TENSOR_BYTES}")
    return b"".join((head[:-2], struct.pack(">BI", 0xC6, size), data))  # the empty bin gives way to a bin 32


def decode(body: bytes | memoryview, terms: Terms | None = None) -> tuple[Header, Message]:
    """Read a message; the tensor is a view of the bytes. Without `terms` anyone may say anything to anybody.

    Raises RemoteProtocolError saying what is wrong with it: Unreadable with the header where that much is right,
    AnotherVersion for a message of a program that speaks another version.
    """
    header, description, data = _split(body, terms)
    if description is None:
        message = _control(header.kind, data, MAX_CONTROL_BYTES if terms is None else terms.control_bytes)
        if terms is not None:
            terms.require(message)
        return header, message
    if header.kind in (Kind.REPORT, Kind.COMMAND):
        raise RemoteProtocolError(f"a {header.kind} with a tensor")
    try:
        payload = _payload(description, data)
    except RemoteProtocolError as error:
        raise Unreadable(header, str(error)) from None
    if header.kind is Kind.GRADIENT:
        return header, Gradient(header.micro_batch, payload)
    if header.kind is Kind.MASKED:
        return header, Masked(header.micro_batch, payload)
    return header, Activation(header.micro_batch, payload, holdout=header.kind is Kind.HOLDOUT)


def _fields_of(message: Report | Command | Status) -> dict[str, Any]:
    """Return the fields of a report or command under the names that every version reads."""
    fields = _fields(message)
    if message.type != "start":
        return fields
    return {_ON_THE_WIRE.get(name, name): value for name, value in fields.items()}


def _fields(value: Any) -> dict[str, Any]:
    """Return a dataclass's fields by name; dataclasses in them are packed the same way, without a copy."""
    return {name: getattr(value, name) for name in value.__dataclass_fields__}


def _split(body: bytes | memoryview, terms: Terms | None) -> tuple[Header, Any, memoryview]:
    """Return the header, the description and the bytes of the last element."""
    unpacker = msgpack.Unpacker(
        max_buffer_size=MAX_HEADER_BYTES,
        read_size=MAX_HEADER_BYTES,
        max_str_len=512,
        max_bin_len=64,
        max_array_len=MAX_RANK,
        max_map_len=0,
        max_ext_len=0,
    )
    view = memoryview(body)
    unpacker.feed(view[:MAX_HEADER_BYTES])
    try:
        fields = unpacker.read_array_header()
        version = unpacker.unpack()
        if (type(version) is not int or version != VERSION) and (fields == _FIELDS or type(version) is int):
            raise AnotherVersion(version)  # which may have more fields, or fewer
        if fields != _FIELDS:
            raise RemoteProtocolError("not a message of sl_queue: the number of fields is wrong")
        header = _header([unpacker.unpack() for _ in range(8)])
    except _UNREADABLE as error:
        raise RemoteProtocolError(f"not a message of sl_queue: unreadable header ({type(error).__name__})") from None
    if terms is not None:
        terms.require_header(header)
    try:
        description, start = unpacker.unpack(), unpacker.tell()
    except _UNREADABLE as error:
        problem = f"unreadable header, in the description of the tensor ({type(error).__name__})"
        raise Unreadable(header, problem) from None
    return header, description, _last(header, view, start)


def _last(header: Header, view: memoryview, start: int) -> memoryview:
    """Return the bytes of the bin at `start`, which must end where the message ends."""
    for marker, length in ((0xC6, ">I"), (0xC5, ">H"), (0xC4, ">B")):
        size = struct.calcsize(length)
        if len(view) >= start + 1 + size and view[start] == marker:
            (declared,) = struct.unpack_from(length, view, start + 1)
            data = view[start + 1 + size :]
            if declared != len(data):
                raise Unreadable(header, f"truncated or padded: {declared} bytes declared, {len(data)} here")
            return data
    raise Unreadable(header, "not a message of sl_queue: the last field is not bytes")


def _header(fields: list[Any]) -> Header:
    run, generation, kind, sender, receiver, step, index, committed = fields
    if not (type(run) is type(kind) is type(sender) is type(receiver) is str) or not (
        type(generation) is type(step) is type(index) is type(committed) is int
    ):
        raise RemoteProtocolError("not a message of sl_queue: a header field has the wrong type")
    known = _KINDS.get(kind)
    if known is None or generation < 0 or step < 0 or index < 0 or committed < BEFORE_FIRST_STEP:
        raise RemoteProtocolError("not a message of sl_queue: a header field is out of range")
    return Header(run, generation, known, sender, receiver, MicroBatch(step, index), committed)


def _payload(description: Any, data: memoryview) -> Payload:
    if type(description) is not list or len(description) < 3:
        raise RemoteProtocolError("the description of the tensor is malformed")
    dtype, shape, rows, *packing = description
    if type(dtype) is not str or type(shape) is not list or type(rows) is not bytes:
        raise RemoteProtocolError("the description of the tensor is malformed")
    size = ITEM_BYTES.get(dtype, 0)
    for length in shape:
        if type(length) is not int or length <= 0:
            raise RemoteProtocolError("the description of the tensor is malformed")
        size *= length
    if dtype not in ITEM_BYTES:
        raise RemoteProtocolError(f"dtype {dtype[:20]!r} is not one of {', '.join(ITEM_BYTES)}")
    if not packing and size == len(data):
        return Payload(dtype, tuple(shape), data, rows)
    match packing:
        case [str(how)] if how and shape and len(data) <= size + SCALE_BYTES * shape[0]:  # `unpack` knows the rest
            return Payload(dtype, tuple(shape), data, rows, how)
        case _:
            raise RemoteProtocolError(f"{dtype} {tuple(shape)} does not take {len(data)} bytes")


def _control(kind: Kind, data: memoryview, most: int) -> Report | Command | Status:
    if kind not in (Kind.REPORT, Kind.COMMAND):
        raise RemoteProtocolError(f"a {kind} without a tensor")
    if len(data) > most:
        raise RemoteProtocolError(f"a {kind} of {len(data)} bytes; {most} are allowed")
    try:
        limits = {"max_array_len": MAX_CONTROL_ITEMS, "max_map_len": MAX_CONTROL_ITEMS, "max_ext_len": 0}
        fields = msgpack.unpackb(data, **limits)
        if kind is Kind.COMMAND and isinstance(fields, dict) and fields.get("type") == "start":
            fields = {_HERE.get(name, name): value for name, value in fields.items()}
        return _reports.validate_python(fields) if kind is Kind.REPORT else _commands.validate_python(fields)
    except (*_UNREADABLE, ValidationError) as error:
        raise RemoteProtocolError(f"unreadable {kind} ({type(error).__name__})") from None
