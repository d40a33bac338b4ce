"""Certificates for TLS in tests."""

import subprocess
from pathlib import Path


def self_signed(folder: Path, alternative_name: str) -> tuple[Path, Path]:
    """A certificate in ``folder`` that signs itself, and its key.

    ``alternative_name`` is whom it is for, as openssl has it: ``IP:127.0.0.1``, ``DNS:a.example``.
    """
    files = folder / "server.crt", folder / "server.key"
    command = (
        "openssl req -x509 -newkey rsa:2048 -nodes -days 2"
        f" -subj /CN={alternative_name.partition(':')[2]}"
        f" -addext subjectAltName={alternative_name} -out {files[0]} -keyout {files[1]}"
    )
    subprocess.run(command.split(), check=True, capture_output=True)
    return files
