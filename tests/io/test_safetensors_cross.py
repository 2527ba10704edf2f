"""Our safetensors reader and writer against the reference package.

Run by ctest, which passes the path of ``safetensors_tool`` in the environment.
"""

from __future__ import annotations

import json
import os
import random
import struct
import subprocess
import sys
from pathlib import Path

SKIPPED = 77  # what ctest takes for a skipped test

try:
    import pytest
    import safetensors
    import safetensors.torch
    import torch
except ImportError as error:
    print(f"skipped: {error}")
    sys.exit(SKIPPED)

TOOL = os.environ["FASTWEIGHTS_SAFETENSORS_TOOL"]

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}

# Name to dtype, shape and bytes.
Tensors = dict[str, tuple[str, list[int], bytes]]


def file_of(header: bytes, data: bytes) -> bytes:
    """Return a file, well formed or not, with this header and this data behind it."""
    return struct.pack("<Q", len(header)) + header + data


def reference_write(tensors: Tensors, metadata: dict[str, str] | None) -> bytes:
    """Return the file that the reference package writes."""
    content: bytes = safetensors.torch.save(
        {
            name: torch.tensor(list(data), dtype=torch.uint8).view(DTYPES[dtype]).reshape(shape)
            for name, (dtype, shape, data) in tensors.items()
        },
        metadata,
    )
    return content


def reference_read(content: bytes) -> Tensors:
    """Return the tensors that the reference package finds, or raise SafetensorError."""
    names = {dtype: name for name, dtype in DTYPES.items()}
    return {
        name: (
            names[tensor.dtype],
            list(tensor.shape),
            bytes(tensor.reshape(-1).view(torch.uint8).tolist()),
        )
        for name, tensor in safetensors.torch.load(content).items()
    }


def metadata_of(content: bytes) -> dict[str, str]:
    """Return the metadata of a file."""
    (length,) = struct.unpack("<Q", content[:8])
    return dict(json.loads(content[8 : 8 + length]).get("__metadata__", {}))


def every_dtype(generator: random.Random) -> Tensors:
    """Return tensors of every dtype: a scalar, a matrix and an empty one of each."""
    tensors: Tensors = {}
    for name, dtype in DTYPES.items():
        for shape, count in (([], 1), ([3, 5], 15), ([2, 0], 0)):
            data = generator.randbytes(count * dtype.itemsize)
            if name == "BOOL":
                data = bytes(byte & 1 for byte in data)
            tensors[f"größe.{name}.{len(shape)}.{count}"] = (name, shape, data)
    return tensors


def mutations(content: bytes, count: int, generator: random.Random) -> list[bytes]:
    """Return files that differ from a good one by a few bytes."""
    results = []
    for _ in range(count):
        altered = bytearray(content)
        for _ in range(generator.choice((1, 1, 2, 3))):
            at = generator.randrange(len(altered))
            altered[at] = generator.choice(b'0123456789,:[]{}"\\ -.eU8FI\0\xff')
        results.append(bytes(altered))
    return results


MALFORMED = {
    "empty": b"",
    "cut off in the length": b"\0\0\0",
    "length beyond the file": struct.pack("<Q", 3) + b"{}",
    "huge length": struct.pack("<Q", 2**64 - 1) + b"{}",
    "no header": file_of(b"", b""),
    "no object": file_of(b"[]", b""),
    "no JSON": file_of(b'{"a"}', b""),
    "NUL behind the header": file_of(b"{}\0", b""),
    "no UTF-8": file_of(b'{"\xff":1}', b""),
    "trailing bytes": file_of(b"{}", b"x"),
    "unknown dtype": file_of(b'{"a":{"dtype":"U9","shape":[1],"data_offsets":[0,1]}}', b"x"),
    "negative dimension": file_of(b'{"a":{"dtype":"U8","shape":[-1],"data_offsets":[0,1]}}', b"x"),
    "fraction": file_of(b'{"a":{"dtype":"U8","shape":[1.0],"data_offsets":[0,1]}}', b"x"),
    "overflow": file_of(
        b'{"a":{"dtype":"F64","shape":[4294967296,4294967296],"data_offsets":[0,0]}}', b""
    ),
    "wrong size": file_of(b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,1]}}', b"x"),
    "backwards": file_of(b'{"a":{"dtype":"U8","shape":[1],"data_offsets":[1,0]}}', b"x"),
    "beyond the file": file_of(b'{"a":{"dtype":"U8","shape":[2],"data_offsets":[0,2]}}', b"x"),
    "gap": file_of(b'{"a":{"dtype":"U8","shape":[1],"data_offsets":[1,2]}}', b"xy"),
    "overlap": file_of(
        b'{"a":{"dtype":"U8","shape":[2],"data_offsets":[0,2]},'
        b'"b":{"dtype":"U8","shape":[2],"data_offsets":[1,3]}}',
        b"xyz",
    ),
    "metadata that are no strings": file_of(b'{"__metadata__":{"a":1}}', b""),
    "missing field": file_of(b'{"a":{"dtype":"U8","shape":[0]}}', b""),
}


@pytest.fixture
def generator() -> random.Random:
    """Return a source of the same numbers for each test."""
    return random.Random(1)


def rewrite(content: bytes, folder: Path) -> bytes:
    """Return the file after our reader read it and our writer wrote it."""
    (folder / "in").write_bytes(content)
    subprocess.run([TOOL, "rewrite", folder / "in", folder / "out"], check=True)
    return (folder / "out").read_bytes()


def verdicts(contents: list[bytes], folder: Path) -> list[str]:
    """Return for each file "ok" or why our reader refuses it."""
    paths = [folder / str(i) for i in range(len(contents))]
    for path, content in zip(paths, contents, strict=True):
        path.write_bytes(content)
    command = [TOOL, "check", *map(str, paths)]
    output = subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout.decode()
    lines = output.splitlines()
    assert len(lines) == len(contents)
    return lines


def test_every_dtype_both_ways(generator: random.Random, tmp_path: Path) -> None:
    """The reference's files are read, and ours are read by the reference."""
    tensors = every_dtype(generator)
    metadata = {"format": "pt", "größe\0": '"\\\n\x7f'}
    written = rewrite(reference_write(tensors, metadata), tmp_path)
    assert reference_read(written) == tensors
    assert metadata_of(written) == metadata


def test_no_tensors(tmp_path: Path) -> None:
    """A file without tensors and metadata goes both ways."""
    assert reference_read(rewrite(reference_write({}, None), tmp_path)) == {}


def test_odd_names(tmp_path: Path) -> None:
    """Names with quotes, control characters and characters beyond 16 bits survive."""
    names = ["", "a\0b", '"\\/\b\f\n\r\t', "𝄞", "\x7f", "'"]
    tensors: Tensors = {name: ("U8", [1], bytes([i])) for i, name in enumerate(names)}
    assert reference_read(rewrite(reference_write(tensors, None), tmp_path)) == tensors


@pytest.mark.parametrize("content", MALFORMED.values(), ids=MALFORMED.keys())
def test_malformed_files_are_refused_by_both(content: bytes, tmp_path: Path) -> None:
    """What the reference refuses, we refuse, with a message that begins with the file's name."""
    with pytest.raises(safetensors.SafetensorError):
        reference_read(content)
    (verdict,) = verdicts([content], tmp_path)
    assert verdict.removeprefix("cannot read ").startswith(f"'{tmp_path}/0'")


def test_altered_files(generator: random.Random, tmp_path: Path) -> None:
    """Whatever we accept, the reference accepts, and finds the same tensors in it."""
    tensors: Tensors = {
        "a": ("U8", [3], b"xyz"),
        "b": ("I8", [1, 2], b"uv"),
        "c": ("U8", [], b"w"),
    }
    contents = mutations(reference_write(tensors, {"k": "v"}), 3000, generator)
    accepted = [
        content
        for content, verdict in zip(contents, verdicts(contents, tmp_path), strict=True)
        if verdict == "ok"
    ]
    assert 50 < len(accepted) < 2000
    for content in accepted:
        assert reference_read(rewrite(content, tmp_path)) == reference_read(content)


if __name__ == "__main__":
    sys.exit(pytest.main([__file__, "-q", "-p", "no:cacheprovider"]))
