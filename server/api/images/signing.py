"""C2PA manifests: a file's digital source type, signed with the operator's certificate."""

from __future__ import annotations

import io
import threading
from pathlib import Path
from typing import Any

import PIL.Image

# IPTC's vocabulary of digital source types.
SOURCE_TYPES = "http://cv.iptc.org/newscodes/digitalsourcetype/"


class Signer:
    """Adds C2PA manifests, signed with the operator's certificate, to files."""

    def __init__(self, certificate: Path, key: Path, algorithm: str) -> None:
        """Load the certificate and try it.

        Args:
            certificate: PEM file, the signing certificate first, its issuers after it.
            key: PEM file of the private key.
            algorithm: C2PA's name of the signature's.

        Raises:
            ValueError: the package is missing, a file cannot be read, or nothing can be signed with
                these files.
        """
        try:
            import c2pa
        except ModuleNotFoundError as error:
            message = "PAELLERA_C2PA_CERTIFICATE needs the extra provenance"
            raise ValueError(f"{message}: pip install 'paellera[provenance]'") from error
        info = c2pa.C2paSignerInfo(
            algorithm, _read(certificate, "CERTIFICATE"), _read(key, "KEY"), b""
        )
        # No timestamp authority. Not every version accepts None as an argument, and an empty URL is
        # one to the library.
        info.ta_url = None
        # One signature at a time: nothing says that the library's signer may be shared by threads.
        self._lock = threading.Lock()
        self._library: Any = c2pa
        try:
            self._signer = c2pa.Signer.from_info(info)
            self._context = c2pa.Context.from_dict({"builder": {"thumbnail": {"enabled": False}}})
            file = io.BytesIO()
            PIL.Image.new("RGB", (1, 1)).save(file, "PNG")
            self.sign(file.getvalue(), "image/png", "trainedAlgorithmicMedia")
        except c2pa.C2paError as error:
            message = f"PAELLERA_C2PA_CERTIFICATE: signing with {certificate.name} failed"
            raise ValueError(f"{message}: {error}") from error

    def sign(self, content: bytes, media_type: str, source: str) -> bytes:
        """Return the file with a signed manifest that states its digital source type."""
        action = {"action": "c2pa.created", "digitalSourceType": SOURCE_TYPES + source}
        manifest = {
            "claim_generator_info": [{"name": "Paellera"}],
            "assertions": [{"label": "c2pa.actions", "data": {"actions": [action]}}],
        }
        signed = io.BytesIO()
        with self._lock, self._library.Builder(manifest, self._context) as builder:
            builder.sign(self._signer, media_type, io.BytesIO(content), signed)
        return signed.getvalue()


def _read(path: Path, kind: str) -> bytes:
    """Return a file's content. Raises ValueError with the name of the setting."""
    try:
        return path.read_bytes()
    except OSError as error:
        raise ValueError(f"PAELLERA_C2PA_{kind}: {path}: {error.strerror}") from error
