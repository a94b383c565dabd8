"""A client's slots after damage on disk, and after a kill at any moment."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from client_app.plan.slots import SlotError
from tests.client_app.plan.slot_toys import after, start_of
from tests.client_app.slot_worker import (
    HEADS,
    LAYOUT,
    carry_out,
    changes,
    personal,
    store_in,
)
from tests.fedalloy_adapters.files.peft_reading import read_peft_directory
from tests.fedalloy_adapters.samples import bits

ROOT = Path(__file__).resolve().parents[3]


# --------------------------------------------------------------------------------------------------------------- damage


@pytest.fixture
def two_rounds(tmp_path: Path) -> Path:
    for round_ in (1, 2):
        carry_out(store_in(tmp_path), round_)
    return tmp_path


def assert_damaged(directory: Path, path: Path) -> None:
    with pytest.raises(SlotError) as caught:
        start_of(directory, 3)
    assert str(path) in str(caught.value)


def test_a_file_cut_anywhere_is_named(two_rounds: Path) -> None:
    path = two_rounds / "slots" / "global" / "exact.safetensors"
    data = path.read_bytes()
    for end in [*range(0, 16), *range(16, len(data), 37), len(data) - 1]:
        path.write_bytes(data[:end])
        assert_damaged(two_rounds, path)
    path.write_bytes(data)
    assert start_of(two_rounds, 3) == after(1, 2)


def test_a_flipped_bit_is_found(two_rounds: Path) -> None:
    """Wherever it is: in the numbers, the layout, the digest or safetensors' own header."""
    path = two_rounds / "slots" / "global" / "exact.safetensors"
    data = path.read_bytes()
    numbers_at = data.index(bits(changes(2)["global"][0].vector))
    positions = [*random.Random(0).sample(range(len(data)), 150), numbers_at, numbers_at + 4 * LAYOUT.size - 1]
    unharmed, messages = 0, list[str]()
    for position in positions:
        spoilt = bytearray(data)
        spoilt[position] ^= 1 << position % 8
        path.write_bytes(spoilt)
        try:
            found = start_of(two_rounds, 3)
        except SlotError as error:
            messages.append(str(error))
        else:
            unharmed += 1  # white space in safetensors' header, say
            assert found == after(1, 2)
    assert all(str(path) in message for message in messages)
    assert unharmed < len(positions) / 10
    path.write_bytes(data)


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"null", b'{"round": "two"}', b'{"round": null}', b"\xff\xfe"])
def test_a_damaged_round_number_is_named(content: bytes, two_rounds: Path) -> None:
    path = two_rounds / "slots" / "state.json"
    path.write_bytes(content)
    assert_damaged(two_rounds, path)


@pytest.mark.parametrize("name", ["state.json", "global/exact.safetensors"])
def test_a_missing_file_is_named(name: str, two_rounds: Path) -> None:
    path = two_rounds / "slots" / name
    path.unlink()
    assert_damaged(two_rounds, path)


def test_damage_to_one_slot_leaves_the_others_readable(two_rounds: Path) -> None:
    (two_rounds / "slots" / "local" / "exact.safetensors").write_bytes(b"junk")
    with store_in(two_rounds).transaction(3) as slots:
        assert slots["global"].digest == after(1, 2)["global"][0]
        with pytest.raises(SlotError, match="slot 'local' is damaged"):
            slots["local"]


# ---------------------------------------------------------------------------------------------------------------- kills


class Worker:
    """The process of ``slot_worker``, which forks one child for each task."""

    def __init__(self) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tests.client_app.slot_worker"],
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def start(self, directory: Path, first: int, count: int = 1, kill_at: int = 0, salt: int = 0) -> int:
        """Start a child; its pid."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        task = {
            "directory": str(directory),
            "first": first,
            "count": count,
            "kill_at": kill_at,
            "salt": salt,
            "progress": f"{directory}.progress",
        }
        self.process.stdin.write(json.dumps(task) + "\n")
        self.process.stdin.flush()
        return int(self.process.stdout.readline())

    def ended_by_kill(self) -> bool:
        """Wait for the child; whether SIGKILL ended it, and not its last round."""
        assert self.process.stdout is not None
        status = int(self.process.stdout.readline())
        if os.WIFSIGNALED(status):
            assert os.WTERMSIG(status) == signal.SIGKILL
            return True
        assert os.WEXITSTATUS(status) == 0
        return False

    def run(self, directory: Path, round_: int, kill_at: int = 0, salt: int = 0) -> bool:
        self.start(directory, round_, 1, kill_at, salt)
        return self.ended_by_kill()


@pytest.fixture(scope="module")
def worker() -> Iterator[Worker]:
    started = Worker()
    yield started
    assert started.process.stdin is not None
    started.process.stdin.close()
    assert started.process.wait(timeout=60) == 0


def assert_whole(directory: Path, round_: int, rerun: bool) -> bool:
    """After a kill in ``round_``, slots and previous slots are those before or after it; returns whether after."""
    history = list(range(1, round_))
    replaced = after(*history) | after(round_, salt=1 if rerun else 0)
    old = after(*history, round_) if rerun else after(*history)
    now = start_of(directory, round_ + 1)
    assert now in (old, replaced)
    assert start_of(directory, round_) == after(*history)
    if not rerun and now == old and round_ > 1:
        assert start_of(directory, round_ - 1) == after(*history[:-1])
    kept = [personal(round_, salt=1 if rerun else 0), personal(round_ if rerun else round_ - 1)]
    if rerun or round_ > 1:
        found = read_peft_directory(directory / "adapter", LAYOUT, HEADS)
        assert any(torch.allclose(found.vector, adapter.vector, atol=1e-6) for adapter in kept)
    assert {path.name for path in directory.iterdir()} <= {"slots", "history", "adapter", ".lock"}
    return now == replaced


@pytest.mark.parametrize(("round_", "rerun"), [(1, False), (2, False), (4, False), (4, True), (1, True)])
def test_killed_before_any_operation_of_a_plan(round_: int, rerun: bool, worker: Worker, tmp_path: Path) -> None:
    """SIGKILL just before the 1st, 2nd, 3rd, ... touch of the disk; and again inside what comes next."""
    prepared = tmp_path / "prepared"
    for earlier in range(1, round_ + rerun):
        carry_out(store_in(prepared), earlier)
    prepared.mkdir(exist_ok=True)
    chance = random.Random(round_)
    outcomes = []
    for kill_at in range(1, 500):
        directory = tmp_path / str(kill_at)
        shutil.copytree(prepared, directory)
        killed = worker.run(directory, round_, kill_at, salt=int(rerun))
        if kill_at % 3 == 0:  # the process that comes after is killed as well, while it cleans up or later
            worker.run(directory, round_, chance.randint(1, 40), salt=int(rerun))
        outcomes.append(assert_whole(directory, round_, rerun))
        shutil.rmtree(directory)
        if not killed:
            break
    else:
        pytest.fail("a plan touches the disk 500 times")
    assert len(outcomes) > 30
    assert outcomes[0] is False
    assert outcomes[-1] is True


def test_killed_at_random_moments(worker: Worker, tmp_path: Path) -> None:
    """SIGKILL from outside, anywhere in a long series of rounds, until enough rounds lie between the kills."""
    directory, progress = tmp_path / "client", tmp_path / "client.progress"
    chance = random.Random(0)
    done = 0
    for kill in range(500):
        if kill >= 25 and done > 10:
            return
        progress.write_text("")
        pid = worker.start(directory, done + 1, count=10**6)
        time.sleep(chance.uniform(0, 0.15 * (1 + kill / 50)))  # longer each time: slow machines get there, too
        os.kill(pid, signal.SIGKILL)
        assert worker.ended_by_kill()
        lines = progress.read_text().splitlines()
        reported = int(lines[-1]) if lines else done
        found = start_of(directory, 10**6)
        state_path = directory / "slots" / "state.json"
        done = json.loads(state_path.read_text())["round"] if state_path.exists() else 0
        assert done in (reported, reported + 1)
        assert found == after(*range(1, done + 1))
        if done:
            assert start_of(directory, done) == after(*range(1, done))
    pytest.fail(f"{done} rounds between 500 kills are too few to prove anything")


def test_a_state_that_is_not_the_one_that_was_written_is_damaged(tmp_path: Path) -> None:
    carry_out(store_in(tmp_path), 1)
    path = tmp_path / "slots" / "state.json"
    path.write_text(path.read_text().replace('"round": 1', '"round": 7'))
    with pytest.raises(SlotError, match=r"state\.json is damaged: .*not those that were written"):
        carry_out(store_in(tmp_path), 8)
