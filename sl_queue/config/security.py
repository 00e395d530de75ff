"""Protection of what parties send: the table [security] of a job, the same at every party."""

from base64 import b64decode
from collections import Counter
from collections.abc import Iterable, Iterator
from typing import Annotated, Literal

from pydantic import AfterValidator, Field

from sl_queue.config.schema import Schema, shown
from sl_queue.protocol.messages import OPERATOR, SCHEDULER
from sl_queue.protocol.text import nearest

_KEY_BYTES = 32
_WHAT = "a public key in base64, as `sl-queue key` prints it"


def _is_key(text: str) -> str:
    try:
        if len(b64decode(text, validate=True)) == _KEY_BYTES:
            return text
    except ValueError:
        pass
    raise ValueError(f"= {shown(text)}; it must be {_WHAT}")


_Key = Annotated[str, AfterValidator(_is_key)]


class JobKeys(Schema):
    """The public keys of a party, the scheduler or the operator."""

    seal: _Key = Field(description=f"{_WHAT}: others seal to it")
    sign: _Key | None = Field(default=None, description=f"{_WHAT}: checks what the scheduler signs")


class JobSecurity(Schema):
    """Sealing of messages from sender to receiver, so that the broker can neither read nor alter them."""

    seal: bool = Field(
        default=False,
        description="true or false: messages are sealed from party to party, so that the broker cannot read them",
    )
    cipher: Literal["aes-256-gcm", "chacha20-poly1305"] = Field(
        default="aes-256-gcm", description='"aes-256-gcm" or "chacha20-poly1305": the cipher of sealed messages'
    )
    keys: dict[str, JobKeys] = Field(
        default={}, description="a table [security.keys.NAME] for each party, the scheduler and the operator"
    )

    def problems(self, parties: Iterable[str]) -> Iterator[str]:
        """Yield what is wrong with the keys of a job with those parties."""
        roles = [*parties, SCHEDULER, OPERATOR]
        for name in self.keys:
            if name not in roles:
                advice = nearest(name, roles)
                yield f"security.keys.{name}: there is no such party; {advice}it must be {', '.join(roles)}"
        missing = [name for name in roles if name not in self.keys]
        if self.seal and missing:
            yield f"security.keys: no key of {', '.join(missing)}; who seals needs the keys of all: `sl-queue key NAME`"
        scheduler = self.keys.get(SCHEDULER)
        if scheduler is not None and scheduler.sign is None:
            yield f"security.keys.{SCHEDULER}.sign is missing; the scheduler signs its commands"
        for key, count in Counter(keys.seal for keys in self.keys.values()).items():
            if count > 1:
                same = ", ".join(name for name, keys in self.keys.items() if keys.seal == key)
                yield f"security.keys: {same} have the same key; each needs one of its own"
