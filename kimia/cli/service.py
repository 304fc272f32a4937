"""What the commands share that talk to a running service: its address, and the files that answers go to."""

from __future__ import annotations

import argparse
import os
import wave
from pathlib import Path
from typing import TYPE_CHECKING

from kimia.errors import ParameterError

if TYPE_CHECKING:
    from kimia.client import Kimia

DEFAULT_SERVER = "localhost:50051"


def add_server(parser: argparse.ArgumentParser, *, required: bool = True) -> None:
    """--server and --tenant; unless `required`, no server is the default."""
    group = parser.add_argument_group("service")
    default = (os.environ.get("KIMIA_SERVER") or DEFAULT_SERVER) if required else None
    told = f" (default: $KIMIA_SERVER or {DEFAULT_SERVER})" if required else ""
    group.add_argument(
        "--server", metavar="HOST:PORT", default=default, help=f"the running service, see kimia up{told}"
    )
    group.add_argument("--tenant", default="", help="customer on whose account this runs")


def open_client(args: argparse.Namespace, patience: float = 0.0, timeout: float = 5.0) -> Kimia:
    """A connected client; `patience` is how long to wait for a free row. Raises UnavailableError."""
    from kimia.client import ClientOptions, Kimia

    check_address(args.server)
    kimia = Kimia(args.server, tenant=args.tenant, options=ClientOptions(patience=patience))
    try:
        kimia.connect(timeout)
    except BaseException:
        kimia.close()
        raise
    return kimia


def check_address(server: str) -> None:
    """Refuse what gRPC would look for in vain, a web address or a name without a port. Raises ParameterError."""
    if server.startswith(("http://", "https://")):
        raise ParameterError(f"{server}: the service speaks gRPC; give HOST:PORT alone, without http://")
    if ":" not in server:
        example = f", for example {server}:50051" if server else ""
        raise ParameterError(f"--server is HOST:PORT{example}; got {server!r}")


def check_writable(path: Path) -> None:
    """Refuse before anything is computed what could not be written afterwards. Raises ParameterError."""
    if not path.parent.is_dir():
        raise ParameterError(f"{path}: the folder {path.parent} does not exist")
    if path.exists() and not path.is_file():
        raise ParameterError(f"{path}: is not a file that can be written")
    if not os.access(path if path.exists() else path.parent, os.W_OK):
        raise ParameterError(f"{path}: no permission to write there")


def write_wav(path: Path, pcm: bytes, sample_rate: int) -> None:
    """Write speech, signed 16-bit PCM. Raises ParameterError."""
    try:
        with path.open("wb") as raw, wave.open(raw, "wb") as file:
            file.setnchannels(1)
            file.setsampwidth(2)
            file.setframerate(sample_rate)
            file.writeframes(pcm)
    except OSError as error:
        raise ParameterError(f"{path}: cannot be written ({error.strerror})") from error
