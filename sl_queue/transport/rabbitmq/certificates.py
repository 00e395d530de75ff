"""Certificates of a connection: when they end, and what is wrong with one that TLS refuses, in our words."""

import socket
import ssl
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

from sl_queue.errors import BrokerUnreachable
from sl_queue.transport.rabbitmq.address import CONNECT_S, Address

BROKER, OWN, AUTHORITY = "broker", "own", "authority"

_NOT_YET, _EXPIRED = 9, 10  # X509_V_ERR_*, of OpenSSL's x509_vfy.h
_UNKNOWN_AUTHORITY = (2, 18, 19, 20, 21, 24, 27)
_OTHER_NAME = (62, 64)


def expiry(secured: socket.socket, address: Address) -> Mapping[str, float]:
    """Return the Unix times at which the broker's certificate and the own one end; empty without TLS."""
    if not isinstance(secured, ssl.SSLSocket):
        return {}
    from cryptography import x509  # a connection without TLS does without

    ends = {}
    with suppress(ValueError, OSError):  # one that cannot be read was not refused by TLS: it is none of our business
        served = secured.getpeercert(binary_form=True)
        if served is not None:
            ends[BROKER] = x509.load_der_x509_certificate(served).not_valid_after_utc.timestamp()
    own = address.files.get("certfile")
    return ends if own is None else {**ends, **_of_file(OWN, own)}


def try_expiry(url: str) -> Mapping[str, float]:
    """Connect, and return what `expiry` does, with the authority's end.

    Of several nodes the first that answers. Raises BrokerUnreachable, JobError for a bad URL.
    """
    *others, last = Address.parse(url)
    for node in others:
        with suppress(OSError):
            return _served(node)
    try:
        return _served(last)
    except OSError as error:
        raise BrokerUnreachable(f"the broker at {last} cannot be used: {error}") from None


def _served(address: Address) -> Mapping[str, float]:
    options = address.parameters("").ssl_options
    if options is None:
        return {}
    with (
        socket.create_connection((address.host, address.port), timeout=CONNECT_S) as plain,
        options.context.wrap_socket(plain, server_hostname=options.server_hostname) as secured,
    ):
        ends = expiry(secured, address)
    authority = address.files.get("cacertfile")
    return ends if authority is None else {**ends, **_of_file(AUTHORITY, authority)}


def _of_file(whose: str, path: str) -> Mapping[str, float]:
    with suppress(ValueError, OSError):
        from cryptography import x509

        found = x509.load_pem_x509_certificates(Path(path).read_bytes())
        return {whose: min(certificate.not_valid_after_utc.timestamp() for certificate in found)}
    return {}


def refused(error: ssl.SSLError, address: Address) -> str:
    """Say what is wrong, and what to do."""
    if isinstance(error, ssl.SSLCertVerificationError):
        return _about_theirs(error, address)
    reason = error.reason or ""
    if "CERTIFICATE_EXPIRED" in reason:
        return "TLS failed: the broker says that this party's own certificate has expired: renew certfile and keyfile"
    if "CERTIFICATE_REQUIRED" in reason:
        return "TLS failed: the broker wants a certificate of this party: add certfile and keyfile to the broker's URL"
    if "UNKNOWN_CA" in reason:
        return "TLS failed: the broker does not know the authority that signed this party's own certificate (certfile)"
    if "ALERT" in reason and "CERTIFICATE" in reason:
        return f"TLS failed: the broker refuses this party's own certificate ({reason.lower()}): renew certfile"
    if "KEY_VALUES_MISMATCH" in reason:
        return "TLS failed: certfile and keyfile do not belong together"
    return (
        f"TLS failed: {error.reason or error}; check the port, the certificates, and amqp:// or amqps:// in the "
        "broker's URL"
    )


def _about_theirs(error: ssl.SSLCertVerificationError, address: Address) -> str:
    """Say what is wrong with the certificate that the broker shows."""
    code = error.verify_code
    if code == _EXPIRED:
        return (
            "TLS failed: the broker's certificate has expired, or one that it is signed with: renew it (`sl-queue "
            "provision` does), or set this machine's clock"
        )
    if code == _NOT_YET:
        return "TLS failed: the broker's certificate is not valid yet: set this machine's clock, or the broker's"
    if code in _UNKNOWN_AUTHORITY:
        return (
            "TLS failed: the broker's certificate is signed by an authority that is not known here: cacertfile in the "
            "broker's URL must name the ca.crt of that broker"
        )
    if code in _OTHER_NAME:
        return (
            f"TLS failed: the broker's certificate is for another name than {address.host!r}: use a name that it "
            "is for in the broker's URL, or have one made for this name"
        )
    return f"TLS failed: the broker's certificate is refused: {error.verify_message}"
