"""Messages to clients with what clients' owners may require: the run's name, and a signature with a known key."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from flwr.app import RecordDict

from fedalloy_adapters.wire.flower_records import CONFIG_RECORD, FORMAT_VERSION, blobs_in, bytes_in, pack
from fedalloy_adapters.wire.signing import SignatureError, Signer
from proto.fedalloy.v1 import plan_pb2
from strategies.framework.options import OptionError


class Requests:
    """Makes the messages of one run.

    Args:
        run_name: the run's name.
        run_config: the run's configuration, as clients get it.
        key: file of the private key that signs; empty: nothing is signed.

    Raises:
        OptionError: the file has no such key.
    """

    def __init__(self, run_name: str, run_config: Mapping[str, Any], key: str = "") -> None:
        self.run_name = run_name
        self.run_config = run_config
        try:
            self.signer = Signer(Path(key).expanduser()) if key else None
        except SignatureError as error:
            raise OptionError(f"sign-with: {error}") from None

    def registration(self) -> RecordDict:
        """The content of a message that asks who a client is."""
        strategy = str(self.run_config.get("strategy", ""))
        request = plan_pb2.RegisterRequest(version=FORMAT_VERSION, run_name=self.run_name, strategy=strategy)
        return self.signed(pack("request", request), "request")

    def signed(self, content: RecordDict, key: str) -> RecordDict:
        """The content, with a signature of its record ``key`` and of its blobs."""
        if self.signer is not None:
            made = self.signer.sign(bytes_in(content, key), self.run_config, blobs_in(content))
            content.config_records[CONFIG_RECORD]["signature"] = made
        return content
