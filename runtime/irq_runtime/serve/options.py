"""What an operator decides about the server."""

from __future__ import annotations

from dataclasses import dataclass, field
from ipaddress import ip_address

from irq_formats.errors import UsageError

__all__ = ["ServeOptions", "is_loopback"]


@dataclass(frozen=True)
class ServeOptions:
    """Address, secret and limits.

    Attributes:
        host: Address to listen on; other machines reach the server only if this is not a loopback one.
        port: 0 takes any free one.
        api_key: What clients must send as bearer token; None: nothing.
        model_name: Name the model is served under.
        sequences: Texts decoded together.
        queue: Requests that may wait for one of those; one more is refused with 429.
        chunk: Prompt tokens read between two decoding steps.
        max_prompt: Tokens of a prompt at most; None: what the context holds.
        max_body: Bytes of a request at most.
        body_timeout_s: Seconds in which a request must have arrived.
        grace_s: Seconds that running requests may take to end after SIGTERM.

    Raises:
        UsageError: A value is out of range.
    """

    host: str = "127.0.0.1"
    port: int = 8000
    api_key: str | None = field(default=None, repr=False)
    model_name: str = "model"
    sequences: int = 4
    queue: int = 64
    chunk: int = 128
    max_prompt: int | None = None
    max_body: int = 1 << 20
    body_timeout_s: float = 30.0
    grace_s: float = 20.0

    def __post_init__(self) -> None:
        for name, low, high in (
            ("port", 0, 65535),
            ("sequences", 1, 64),
            ("queue", 0, 1 << 16),
            ("chunk", 1, 4096),
            ("max_prompt", 1, 1 << 31),
            ("max_body", 1, 1 << 30),
            ("body_timeout_s", 0.1, 3600),
            ("grace_s", 0, 3600),
        ):
            value = getattr(self, name)
            if value is not None and not low <= value <= high:
                raise UsageError("out of range", where=name, expected=f"{low} to {high}", got=value)
        if self.api_key is not None and not (self.api_key and self.api_key.isascii()):
            raise UsageError(
                "not usable in a header", where="api_key", expected="one or more ASCII characters"
            )

    @property
    def is_local(self) -> bool:
        """Whether only this machine can connect."""
        return is_loopback(self.host)


def is_loopback(name: str) -> bool:
    """Return whether a name or address always means this machine."""
    try:
        return name == "localhost" or ip_address(name).is_loopback
    except ValueError:
        return False
