"""The errors and bytes of each encoding on real differences: measurements behind the codec's choices.

    python -m tests.benchmarks.encodings     # minutes

The differences are what clients of the built-in ``digits`` scenario upload in a run of ``fedavg``: the trained adapter
minus the received one, of each client and round. It prints the relative error (norm of the dropped part over the norm
of the difference) and the bits per number, as means over the differences:

* every encoding as it is, and INT4 and INT2 with other sizes of blocks;
* ``topk``: the largest numbers kept as 8-bit integers with one scale per tensor, their positions at the entropy bound
  (log2 of the number of ways to choose them), so that no coder can do better, at the bits of INT4, INT2 and one bit;
* ``entropy``: bits that an ideal coder without memory needs for the codes of an encoding, beside the results of DEFLATE
(level 9) and zstd (level 19): what a lossless stage could save; * ``balanced``: both factors of a module scaled to one
norm (A / c, c B) before they are encoded; * ``budget``: the encoding of each tensor chosen for the smallest error of
the whole in as many bits as INT4 or INT2
  takes, knowing all errors: the most that a rule could gain that picks encodings for a budget of bytes;
* ``rounding``: the same difference sent again and again, the error of the sum after 16 times: nearest without feedback,
  stochastic without feedback, nearest with feedback, stochastic with feedback.
"""

from __future__ import annotations

import math
import tempfile
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from statistics import mean
from typing import Any

import pyarrow
import torch
from rich.console import Console
from rich.table import Table
from safetensors.torch import load_file
from torch import Tensor

from fedalloy_adapters.adapter import Adapter
from fedalloy_adapters.layout import Layout
from fedalloy_adapters.wire import block_quantisation
from fedalloy_adapters.wire.codec import Encoding, encode, payload_size
from proto.fedalloy.v1 import adapter_pb2
from tests.fedalloy_adapters.samples import INTEGERS
from tests.in_process import run_in_process

TIMES = 16
console = Console(width=120)


def differences(clients: int = 4, rounds: int = 4) -> list[Adapter]:
    """Trained minus received adapters of a run; clients keep what they received if the downlink is lossy."""
    found = []
    with tempfile.TemporaryDirectory() as text:
        config: dict[str, Any] = {"strategy": "fedavg", "num_server_rounds": rounds, "keep_checkpoints": rounds}
        run_in_process(Path(text), clients, run_name="run", downlink_encoding="bf16", **config)
        for path in sorted(Path(text).glob("run/clients/*/history/*/global/exact.safetensors")):
            tensors = load_file(path)
            layout = Layout.from_proto(adapter_pb2.Layout.FromString(bytes(tensors["layout"].tolist())))
            found.append(Adapter(layout, tensors["vector"] - tensors["received_vector"]))
    return [one for one in found if float(one.vector.norm()) > 0]


@contextmanager
def blocks_of(size: int) -> Iterator[None]:
    """Another size of blocks."""
    before = block_quantisation.BLOCK
    block_quantisation.BLOCK = size
    try:
        yield
    finally:
        block_quantisation.BLOCK = before


def measured(found: list[Adapter], encoding: Encoding) -> tuple[float, float]:
    """Mean relative error, and bits per number."""
    errors, bits = [], []
    for one in found:
        sent = encode(one, encoding)
        errors.append(relative(sent.decoded.vector, one.vector))
        bits.append(8 * sent.payload_bytes / one.layout.size)
    return mean(errors), mean(bits)


def relative(decoded: Tensor, meant: Tensor) -> float:
    """Norm of the error over the norm of the intended numbers."""
    return float((decoded - meant).norm() / meant.norm())


def top_k(one: Adapter, bits: float) -> tuple[float, float]:
    """Relative error and bits per number if the largest numbers of each tensor are kept, as many as the bits allow."""
    kept, used = torch.zeros_like(one.vector), 0.0
    for entry in one.layout.entries:
        place = one.layout.slice_of(entry.name)
        numbers = one.vector[place]
        count = max(k for k in range(entry.size + 1) if _top_k_bits(entry.size, k) <= bits * entry.size or k == 0)
        chosen = numbers.abs().topk(count).indices
        scale = float(numbers.abs().max()) / 127 or 1.0
        kept[place] = torch.zeros(entry.size).index_copy(0, chosen, (numbers[chosen] / scale).round() * scale)
        used += _top_k_bits(entry.size, count)
    return relative(kept, one.vector), used / one.layout.size


def _top_k_bits(size: int, count: int) -> float:
    ways = math.lgamma(size + 1) - math.lgamma(count + 1) - math.lgamma(size - count + 1)
    return 8 * count + ways / math.log(2) + 32


def balanced(one: Adapter, encoding: Encoding) -> tuple[float, float]:
    """Relative error and bits per number if the factors of each module are sent with equal norms."""
    factors = torch.ones_like(one.vector)
    places = {(e.module, e.factor): one.layout.slice_of(e.name) for e in one.layout.entries if e.factor.is_lora}
    for (module, factor), place in places.items():
        other = next((p for (name, f), p in places.items() if name == module and f is not factor), place)
        ratio = float(one.vector[other].norm() / one.vector[place].norm())
        factors[place] = ratio**0.5 if 0 < ratio < math.inf else 1.0
    sent = encode(Adapter(one.layout, one.vector * factors), encoding)
    return relative(sent.decoded.vector / factors, one.vector), 8 * sent.payload_bytes / one.layout.size


def budgeted(one: Adapter, fixed: Encoding) -> tuple[float, float]:
    """Relative error and bits per number of the best choice for each tensor in as many bits as ``fixed`` takes.

    It is found by a price for a bit, which is halved until the budget is used.
    """
    ways = (Encoding.INT2, Encoding.INT4, Encoding.INT8, Encoding.FP16)
    dropped = {encoding: encode(one, encoding).decoded.vector - one.vector for encoding in ways}
    choices: list[list[tuple[float, float]]] = []
    for entry in one.layout.entries:
        place, alone = one.layout.slice_of(entry.name), one.layout.select([entry.factor], [entry.module])
        bits = {encoding: 8.0 * payload_size(alone, encoding) for encoding in ways}
        choices.append([(float(dropped[way][place].square().sum()), bits[way]) for way in ways])
    most = 8 * payload_size(one.layout, fixed)
    chosen, price = [min(tried, key=lambda way: way[1]) for tried in choices], float(one.vector.square().sum())
    while price > 1e-12 * float(one.vector.square().sum()):
        now = [min((error + price * bits, (error, bits)) for error, bits in tried)[1] for tried in choices]
        if sum(bits for _, bits in now) <= most:
            chosen = now
        price *= 0.97
    error, bits = sum(e for e, _ in chosen), sum(b for _, b in chosen)
    return math.sqrt(error) / float(one.vector.norm()), bits / one.layout.size


def squeezed(found: list[Adapter], encoding: Encoding) -> tuple[float, float, float, float]:
    """Bits per number: as they are, after DEFLATE, after zstd, and the entropy of the payload's bytes."""
    plain, deflated, zstd, entropy = [], [], [], []
    codec = pyarrow.Codec("zstd", compression_level=19)
    for one in found:
        sent = encode(one, encoding)
        payload = sent.blob[-sent.payload_bytes :]
        counts = torch.bincount(torch.frombuffer(bytearray(payload), dtype=torch.uint8).to(torch.int64)).double()
        shares = counts[counts > 0] / len(payload)
        plain.append(8 * len(payload) / one.layout.size)
        deflated.append(8 * len(zlib.compress(payload, 9)) / one.layout.size)
        zstd.append(8 * len(codec.compress(payload, asbytes=True)) / one.layout.size)
        entropy.append(float(-(shares * shares.log2()).sum()) * len(payload) / one.layout.size)
    return mean(plain), mean(deflated), mean(zstd), mean(entropy)


def stochastic(numbers: Adapter, encoding: Encoding, draw: torch.Generator) -> Tensor:
    """Decoded numbers if each is rounded to a neighbouring level by chance, so that the mean is the number."""
    nearest = encode(numbers, encoding).decoded.vector
    steps = torch.empty_like(nearest)
    for entry in numbers.layout.entries:  # the distance of two levels, as the block's largest error bounds it
        place = numbers.layout.slice_of(entry.name)
        error = (numbers.vector[place] - nearest[place]).abs()
        padded = torch.zeros(-(-entry.size // block_quantisation.BLOCK) * block_quantisation.BLOCK)
        padded[: entry.size] = error
        largest = padded.view(-1, block_quantisation.BLOCK).amax(dim=1)
        steps[place] = (2 * largest).repeat_interleave(block_quantisation.BLOCK)[: entry.size]
    other = torch.where(numbers.vector > nearest, nearest + steps, nearest - steps)
    chance = ((numbers.vector - nearest) / (other - nearest)).nan_to_num(0.0).clamp(0, 1)
    return torch.where(torch.rand(chance.shape, generator=draw) < chance, other, nearest)


def repeated(one: Adapter, encoding: Encoding, by_chance: bool, feedback: bool) -> float:
    """Relative error of the sum after :data:`TIMES` times the same difference."""
    draw = torch.Generator().manual_seed(0)
    total, residual = torch.zeros_like(one.vector), torch.zeros_like(one.vector)
    for _ in range(TIMES):
        meant = Adapter(one.layout, one.vector + residual)
        decoded = stochastic(meant, encoding, draw) if by_chance else encode(meant, encoding).decoded.vector
        residual = meant.vector - decoded if feedback else residual
        total += decoded
    return relative(total, TIMES * one.vector)


def show(title: str, rows: Mapping[str, tuple[float, ...]], *columns: str) -> None:
    """One table."""
    table = Table(title=title, title_justify="left")
    for column in ("", *columns):
        table.add_column(column, justify="right" if column else "left")
    for name, values in rows.items():
        table.add_row(name, *(f"{value:.4f}" for value in values))
    console.print(table)


def main() -> None:
    """Measure and print."""
    found = differences()
    console.print(f"{len(found)} differences of {found[0].layout.size} numbers")
    rows = {str(encoding): measured(found, encoding) for encoding in Encoding}
    for encoding in INTEGERS:
        for size in (32, 64, 128):
            with blocks_of(size):
                rows[f"{encoding}, blocks of {size}"] = measured(found, encoding)
    for bits in (rows["int4"][1], rows["int2"][1], 1.0):
        tried = [top_k(one, bits) for one in found]
        rows[f"topk at {bits:.2f} bits"] = mean(error for error, _ in tried), mean(used for _, used in tried)
    for encoding in INTEGERS:
        scaled = [balanced(one, encoding) for one in found]
        rows[f"{encoding}, balanced"] = mean(error for error, _ in scaled), mean(bits for _, bits in scaled)
    for encoding in (Encoding.INT4, Encoding.INT2):
        best = [budgeted(one, encoding) for one in found]
        rows[f"budget of {encoding}"] = mean(error for error, _ in best), mean(bits for _, bits in best)
    show("One difference", rows, "relative error", "bits per number")
    lossless = {str(encoding): squeezed(found, encoding) for encoding in Encoding}
    show("A lossless stage", lossless, "bits per number", "deflated", "zstd", "entropy of bytes")
    ways = {"nearest": (False, False), "stochastic": (True, False), "nearest, feedback": (False, True)}
    ways |= {"stochastic, feedback": (True, True)}
    sums = {
        f"{encoding}, {name}": (mean(repeated(one, encoding, *way) for one in found[:6]),)
        for encoding in INTEGERS
        for name, way in ways.items()
    }
    show(f"The sum of {TIMES} times the same difference", sums, "relative error")


if __name__ == "__main__":
    main()
