from __future__ import annotations

import hashlib
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from google.protobuf.descriptor import Descriptor

from fedalloy_adapters.adapter import Adapter
from fedalloy_adapters.layout import Entry, Factor, Layout
from fedalloy_adapters.wire.codec import CodecErrorCode, Encoding, decode, encode
from proto.fedalloy.v1 import adapter_pb2, plan_pb2, report_pb2, trainer_pb2

ROOT = Path(__file__).resolve().parent.parent
SPECIFICATION = (ROOT / "proto" / "README.md").read_text()


def run(*command: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)


def test_generated_code_is_that_of_the_proto_files() -> None:
    pytest.importorskip("grpc_tools", reason="grpcio-tools is not installed")
    result = run(sys.executable, "proto/generate.py", "--check")
    assert result.returncode == 0, f"{result.stdout}{result.stderr}run 'make proto'"


def test_proto_files_pass_buf_lint() -> None:
    beside_python = Path(sys.executable).parent / "buf"
    buf = str(beside_python) if beside_python.exists() else shutil.which("buf")
    if buf is None:
        pytest.skip("no buf command (pip install buf-bin)")
    result = run(buf, "lint")
    assert result.returncode == 0, result.stdout + result.stderr


def _messages(descriptor: Descriptor) -> list[Descriptor]:
    nested = [kind for kind in descriptor.nested_types if not kind.GetOptions().map_entry]
    return [descriptor, *(inner for kind in nested for inner in _messages(kind))]


def test_specification_names_every_message_field_and_enum_value() -> None:
    files = [adapter_pb2.DESCRIPTOR, plan_pb2.DESCRIPTOR, report_pb2.DESCRIPTOR, trainer_pb2.DESCRIPTOR]
    names: set[str] = set()
    for file in files:
        for message in (inner for kind in file.message_types_by_name.values() for inner in _messages(kind)):
            names.add(message.name)
            oneof_cases = {field.name for oneof in message.oneofs for field in oneof.fields}
            # The cases of a step or result are specified by the message that each of them holds.
            skipped = oneof_cases if message.name in {"Step", "StepResult"} else set()
            names |= {field.name for field in message.fields} - skipped
        for enum in file.enum_types_by_name.values():
            # UNSPECIFIED is protobuf's own rule; the specification forbids it where it matters.
            names |= {value.name for value in enum.values if not value.name.endswith("UNSPECIFIED")}
    missing = sorted(name for name in names if f"`{name}`" not in SPECIFICATION)
    assert not missing


def test_specification_names_exactly_the_codec_errors() -> None:
    errors = SPECIFICATION.split("## 5. Errors")[1].split("## 6.")[0]
    rows = re.findall(r"^\| \d+ \|.*\| `([A-Z_]+)` \|$", errors, re.MULTILINE)
    assert set(rows) == {code.value for code in CodecErrorCode}


def _vector(label: str) -> bytes:
    found = re.search(rf"^\| {re.escape(label)}(?:, [^|]*)? \| `([0-9a-f]+)` \|$", SPECIFICATION, re.MULTILINE)
    assert found is not None, label
    return bytes.fromhex(found[1])


def _example() -> Adapter:
    entries = (
        Entry("q_proj", Factor.A, (1, 2)),
        Entry("q_proj", Factor.B, (3, 1)),
        Entry("norm", Factor.BIAS, (2,)),
    )
    layout = Layout(entries, {"q_proj": 2.0}, "base")
    return Adapter(layout, torch.tensor([1.0, -0.5, 0.0, 0.25, 3.0, -127.0, 1.0]))


@pytest.mark.parametrize("encoding", list(Encoding))
def test_payload_is_that_of_the_specification(encoding: Encoding) -> None:
    payload = _vector(f"payload {encoding.value.upper()}")
    encoded = encode(_example(), encoding)
    assert encoded.blob.endswith(payload)
    assert encoded.payload_bytes == len(payload)


def test_digests_are_those_of_the_specification() -> None:
    example = _example()
    assert example.layout.digest == _vector("layout digest")
    assert example.digest == _vector("content digest")
    assert encode(example, Encoding.INT8).decoded.digest == _vector("content digest after INT8")


def test_layout_digest_is_the_hash_of_the_written_out_canonical_text() -> None:
    canonical = SPECIFICATION.split("```json\n")[1].split("\n```")[0]
    assert hashlib.sha256(canonical.encode()).digest() == _vector("layout digest")
    assert json.dumps(json.loads(canonical), sort_keys=True, separators=(",", ":")) == canonical


def test_blob_of_the_specification_decodes() -> None:
    blob = bytes.fromhex(SPECIFICATION.split("```hex\n")[1].split("```")[0].replace("\n", ""))
    adapter = decode(blob)
    assert adapter.layout == _example().layout
    assert adapter.digest == _vector("content digest after INT8")
    assert adapter["norm", Factor.BIAS].tolist() == [-127.0, 1.0]


def test_canonical_text_escapes_as_the_specification_says() -> None:
    layout = Layout((Entry('é"\\😀', Factor.WEIGHT, (1,)),), {}, "base")
    canonical = r'{"base":"base","entries":[["\u00e9\"\\\ud83d\ude00","weight",[1]]],"scalings":[]}'
    assert layout.digest == hashlib.sha256(canonical.encode("ascii")).digest()
