"""The digits scenario: disjoint pools and shards, clients that differ, and a base model that is made exactly once."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load, save
from torch import Tensor

from client_app.data.dataset import Base
from client_app.scenarios import ScenarioError, digits, load_scenario, vit

REPOSITORY = Path(__file__).parents[3]
SPLITS = ("train", "validation", "test")
QUICK = vit.Recipe(
    name="quick",
    data="eight random images",
    image_size=4,
    patch_size=2,
    classes=2,
    width=8,
    depth=1,
    heads=2,
    mlp=8,
    seed=3,
    steps=11,
    batch=4,
    learning_rate=1e-3,
    weight_decay=0.0,
    initializer_range=0.1,
)


def quick_examples() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(8, 1, 4, 4, generator=generator), torch.tensor([0, 1] * 4)


def must_not_train() -> tuple[Tensor, Tensor]:
    raise AssertionError("pre-trained although a valid base model was there")


def numbers(base: Base) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in base.model.state_dict().items()}


def same(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def upright_images(dataset_images: Tensor, group: digits.Group) -> set[bytes]:
    """Undoes a group's transform, so that images of different groups can be compared."""
    plain = -dataset_images if group.inverted else dataset_images
    plain = torch.rot90(plain, -group.quarter_turns, (2, 3))
    return {image.contiguous().numpy().tobytes() for image in plain}


def test_pools_divide_all_images() -> None:
    pools = digits.pools()
    assert {name: len(pool) for name, pool in pools.items()} == digits.POOLS
    together = np.concatenate(list(pools.values()))
    assert sorted(together.tolist()) == list(range(1797))


def test_no_training_image_is_anybodys_test_image_or_public() -> None:
    images, _ = digits._read()
    pools = digits.pools()
    held_out = {images[i].tobytes() for name in ("public", "validation", "test") for i in pools[name]}
    seen: set[bytes] = set()
    for client in range(4):
        data = digits.load_client(client, 4, seed=0)
        mine = upright_images(data.splits["train"].inputs["pixel_values"], digits.group_of(client, 4))
        assert len(mine) == len(data.splits["train"])
        assert not mine & held_out
        assert not mine & seen
        seen |= mine
        test = upright_images(data.splits["test"].inputs["pixel_values"], digits.group_of(client, 4))
        assert test == {images[i].tobytes() for i in pools["test"]}


@pytest.mark.parametrize("clients", [1, 4, 20, 50, digits.MAX_CLIENTS])
def test_shards_are_disjoint_unequal_and_tests_are_large(clients: int) -> None:
    pool = digits.pools()["train"]
    shards = digits._shards(pool, clients, seed=5)
    together = np.concatenate(shards)
    assert len(shards) == clients
    assert len(set(together.tolist())) == len(together)
    assert set(together.tolist()) <= set(pool.tolist())
    for client in range(clients):
        data = digits.load_client(client, clients, seed=5)
        assert [len(data.splits["train"]), len(data.splits["test"])] == [len(shards[client]), 447]
        assert len(data.splits["train"]) >= (8 if clients <= 50 else 2)
    if clients > 1:
        assert max(map(len, shards)) >= 1.5 * min(map(len, shards))


def test_every_group_has_at_least_two_members_of_different_sizes() -> None:
    for clients in range(4, digits.MAX_CLIENTS + 1):
        sizes: dict[str, set[int]] = {}
        for client, shard in enumerate(digits._shards(digits.pools()["train"], clients, seed=0)):
            sizes.setdefault(digits.group_of(client, clients).name, set()).add(len(shard))
        assert all(len(found) >= 2 for found in sizes.values()), (clients, sizes)
        assert len(sizes) == min(4, clients // 2)


def test_groups_see_and_name_the_same_test_images_differently() -> None:
    images, labels = digits._read()
    test = digits.pools()["test"]
    codes = []
    for client, group in enumerate(digits.GROUPS):
        split = digits.load_client(client, 8, seed=0).splits["test"]
        expected = images[test]
        expected = np.rot90(expected, group.quarter_turns, axes=(1, 2))
        expected = -expected if group.inverted else expected
        assert torch.equal(split.inputs["pixel_values"][:, 0], torch.from_numpy(np.ascontiguousarray(expected)))
        assert sorted(group.codes) == list(range(10))
        assert [int(label) for label in split.labels] == [group.codes[digit] for digit in labels[test]]
        assert sum(code != digit for digit, code in enumerate(group.codes)) == 5
        codes.append(group.codes)
    assert len(set(codes)) == len(codes)


def test_a_rotated_pixel_is_where_it_should_be() -> None:
    """A quarter turn counter-clockwise takes the top right corner to the top left."""
    images, _ = digits._read()
    first = digits.pools()["test"][0]
    rotated = digits.load_client(1, 4, seed=0).splits["test"].inputs["pixel_values"][0, 0]
    assert digits.group_of(1, 4).name == "rotated"
    assert torch.equal(rotated[0], torch.from_numpy(images[first][:, 7].copy()))


def test_data_depend_on_the_seed_alone() -> None:
    first, again, other = (digits.load_client(2, 4, seed).splits for seed in (7, 7, 8))
    for split in SPLITS:
        assert torch.equal(first[split].inputs["pixel_values"], again[split].inputs["pixel_values"])
        assert torch.equal(first[split].labels, again[split].labels)
    assert not torch.equal(first["train"].inputs["pixel_values"], other["train"].inputs["pixel_values"])
    assert torch.equal(first["test"].inputs["pixel_values"], other["test"].inputs["pixel_values"])


def test_splits_are_float_images_in_range_and_integer_codes() -> None:
    for split in digits.load_client(3, 4, seed=0).splits.values():
        pixels = split.inputs["pixel_values"]
        assert pixels.dtype == torch.float32
        assert pixels.shape == (len(split), 1, 8, 8)
        assert (float(pixels.min()), float(pixels.max())) == (-1.0, 1.0)
        assert split.labels.dtype == torch.int64


@pytest.mark.parametrize(
    ("partition", "clients", "words"),
    [(4, 4, "expected 0 to 3"), (-1, 4, "expected 0 to 3"), (0, 0, "1 to 200"), (0, 201, "num-partitions = 201")],
)
def test_a_client_that_does_not_exist_is_refused(partition: int, clients: int, words: str) -> None:
    with pytest.raises(ScenarioError, match=words):
        digits.load_client(partition, clients, seed=0)


def test_an_unknown_scenario_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(ScenarioError, match=r"'digit' is unknown, expected one of: digits"):
        load_scenario("digit", 0, 4, 0, tmp_path)


def test_base_knows_upright_digits_with_their_usual_labels(base_cache: Path) -> None:
    base, data = load_scenario("digits", 0, 4, 0, base_cache)
    images, labels = digits._read()
    test = digits.pools()["test"]
    with torch.no_grad():
        upright = base.model(pixel_values=torch.from_numpy(images[test])[:, None]).logits.argmax(-1)
        as_client = base.model(**data.splits["test"].inputs).logits.argmax(-1)
    assert float((upright == torch.from_numpy(labels[test])).float().mean()) > 0.88
    # Half of client 0's codes are its own: without adapting, the base must be wrong about them.
    assert float((as_client == data.splits["test"].labels).float().mean()) < 0.6


def test_base_is_frozen_in_evaluation_mode_and_names_what_adapters_change(base_cache: Path) -> None:
    base = digits.load_base(base_cache)
    assert not base.model.training
    assert not any(parameter.requires_grad for parameter in base.model.parameters())
    assert base.targets == tuple(
        f"vit.layers.{layer}.attention.{name}" for layer in range(3) for name in ("q_proj", "k_proj", "v_proj")
    )
    assert base.heads == ("classifier",)
    assert base.fingerprint == digits.base_fingerprint()
    assert len(base.fingerprint) == 64


def test_cache_is_an_ordinary_transformers_directory(base_cache: Path) -> None:
    from transformers import ViTForImageClassification

    base = digits.load_base(base_cache)
    directory = base_cache / f"{digits.BASE_RECIPE.name}-{digits.BASE_RECIPE.fingerprint[:16]}"
    assert same(numbers(base), dict(ViTForImageClassification.from_pretrained(directory).state_dict()))


def test_loading_does_not_train_and_leaves_random_numbers_alone(tmp_path: Path) -> None:
    torch.manual_seed(1)
    made = numbers(vit.load_or_pretrain(QUICK, tmp_path, quick_examples))
    loaded = numbers(vit.load_or_pretrain(QUICK, tmp_path, must_not_train))
    after = torch.rand(3)
    torch.manual_seed(1)
    assert same(made, loaded)
    assert torch.equal(after, torch.rand(3))


def test_pre_training_is_deterministic(tmp_path: Path) -> None:
    torch.manual_seed(1)
    first = numbers(vit.load_or_pretrain(QUICK, tmp_path / "a", quick_examples))
    torch.manual_seed(2)
    assert same(first, numbers(vit.load_or_pretrain(QUICK, tmp_path / "b", quick_examples)))


def test_another_recipe_is_another_model(tmp_path: Path) -> None:
    from dataclasses import replace

    other = replace(QUICK, steps=12)
    first = vit.load_or_pretrain(QUICK, tmp_path, quick_examples)
    second = vit.load_or_pretrain(other, tmp_path, quick_examples)
    assert first.fingerprint != second.fingerprint
    assert not same(numbers(first), numbers(second))
    assert same(numbers(first), numbers(vit.load_or_pretrain(QUICK, tmp_path, must_not_train)))


@pytest.mark.parametrize(
    "damage", ["torn", "flipped", "empty", "alien", "file", "no-record", "record-of-another", "other-names"]
)
def test_a_damaged_cache_is_made_again(tmp_path: Path, damage: str) -> None:
    good = numbers(vit.load_or_pretrain(QUICK, tmp_path, quick_examples))
    (directory,) = (path for path in tmp_path.iterdir() if path.is_dir())
    weights, record = directory / "model.safetensors", directory / "recipe.json"
    content = weights.read_bytes()
    if damage == "torn":
        weights.write_bytes(content[: len(content) // 2])
    elif damage == "flipped":
        weights.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    elif damage == "empty":
        for path in directory.iterdir():
            path.unlink()
    elif damage == "alien":
        record.write_text("[]")
    elif damage == "file":
        for path in directory.iterdir():
            path.unlink()
        directory.rmdir()
        directory.write_text("not a directory")
    elif damage == "no-record":
        record.unlink()
    elif damage == "other-names":
        weights.write_bytes(save({f"old.{name}": tensor for name, tensor in load(content).items()}))
        changed = json.loads(record.read_text())
        record.write_text(json.dumps(changed | {"weights": hashlib.sha256(weights.read_bytes()).hexdigest()}))
    else:
        changed = json.loads(record.read_text())
        record.write_text(json.dumps(changed | {"fingerprint": "0" * 64}))
    calls = []

    def examples() -> tuple[Tensor, Tensor]:
        calls.append(1)
        return quick_examples()

    assert same(good, numbers(vit.load_or_pretrain(QUICK, tmp_path, examples)))
    assert calls == [1]
    assert same(good, numbers(vit.load_or_pretrain(QUICK, tmp_path, must_not_train)))
    assert sorted(path.name for path in tmp_path.iterdir()) == [directory.name, f"{directory.name}.lock"]


RACER = """
import sys, time
from pathlib import Path
import torch, transformers
from transformers import ViTForImageClassification
from client_app.scenarios import vit
from tests.client_app.scenarios.test_digits import QUICK, quick_examples
cache = Path({cache!r})
def examples():
    (cache / "trained").open("a").write("x")
    time.sleep(1.0)
    return quick_examples()
(cache / f"ready-{{sys.argv[1]}}").touch()
while not all((cache / f"ready-{{n}}").exists() for n in "01"):
    time.sleep(0.01)
base = vit.load_or_pretrain(QUICK, cache, examples)
print(sum(float(tensor.double().abs().sum()) for tensor in base.model.state_dict().values()))
"""


def test_processes_that_race_for_the_first_use_train_once(tmp_path: Path) -> None:
    code = RACER.format(cache=str(tmp_path))
    racers = [
        subprocess.Popen(
            [sys.executable, "-c", code, number],
            cwd=REPOSITORY,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for number in "01"
    ]
    try:
        answers = [racer.communicate(timeout=300) for racer in racers]
    finally:
        for racer in racers:
            racer.kill()
    assert [racer.returncode for racer in racers] == [0, 0], answers
    assert answers[0][0] == answers[1][0] != ""
    assert (tmp_path / "trained").read_text() == "x"


def test_data_are_read_without_importing_scikit_learn() -> None:
    code = (
        "import sys; from client_app.scenarios import digits; digits.load_client(0, 4, 0); "
        "print([name for name in ('sklearn', 'transformers', 'peft') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_images_are_those_of_scikit_learn() -> None:
    from sklearn.datasets import load_digits

    bunch = load_digits()
    images, labels = digits._read()
    assert np.array_equal((images + 1) * 8, bunch.images)
    assert np.array_equal(labels, bunch.target)
