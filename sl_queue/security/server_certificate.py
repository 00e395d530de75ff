"""A server's certificate and key in files, checked before anything is served with them."""

import ssl
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from cryptography import x509

from sl_queue.errors import JobError
from sl_queue.security.private_file import read_secret


@dataclass(frozen=True, slots=True)
class ServerCertificate:
    """A certificate that is valid now, and the key that belongs to it."""

    certificate: Path
    key: Path
    ends: datetime

    @classmethod
    def read(cls, certificate: Path, key: Path, now: datetime) -> "ServerCertificate":
        """Read and compare both. Raises JobError, which names the file."""
        try:
            chain = x509.load_pem_x509_certificates(certificate.read_bytes())
        except (OSError, ValueError) as error:
            raise JobError(f"{certificate}: no certificate in PEM can be read from it ({_why(error)})") from None
        begins, ends = chain[0].not_valid_before_utc, chain[0].not_valid_after_utc
        if now > ends:
            raise JobError(f"{certificate}: the certificate has expired on {_day(ends)}; renew it")
        if now < begins:
            raise JobError(
                f"{certificate}: the certificate is valid from {_day(begins)} on; is this machine's clock right?"
            )
        try:
            read_secret(key, "private key")
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            context.load_cert_chain(certificate, key, password="")  # without, a terminal is asked for one
        except ssl.SSLError as error:
            if error.reason == "KEY_VALUES_MISMATCH":
                raise JobError(f"{key}: the key does not belong to the certificate {certificate}") from None
            raise JobError(f"{key}: no private key in PEM without a password can be read from it") from None
        except (OSError, ValueError) as error:
            raise JobError(f"{key}: the key cannot be read ({_why(error)})") from None
        return cls(certificate, key, ends)


def _why(error: Exception) -> str:
    return (error.strerror if isinstance(error, OSError) else None) or type(error).__name__


def _day(moment: datetime) -> str:
    return moment.astimezone(UTC).strftime("%Y-%m-%d %H:%M UTC")
