"""Images beside texts: what the processor says about each token is kept, and every example keeps its own images."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional

from client_app.data.dataset import Base, ClientData, Dataset
from client_app.data.joined import join
from client_app.data.targets import IGNORED, at_targets, target_mask
from client_app.kinds import kind_of
from client_app.own.chat import ChatTemplate
from client_app.own.encoding import Encoder
from client_app.own.examples import read_example
from client_app.own.reading.text_files import DataError, Row
from client_app.plan import evaluation, fisher, training
from client_app.settings import DataSettings
from tests.client_app.own_clients import loaded, personal, settings_of
from tests.toys import tiny_models, toy_data

KIND = kind_of("image-text-to-text")
PARTS = (
    "{% for m in messages %}<{{ m.role }}>{% for part in m.content %}{% if part.type == 'image' %}<|image_pad|>"
    "{% else %}{{ part.text }}{% endif %}{% endfor %}{{ '</s>' if m.role == 'assistant' else '' }}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
"""A chat template for messages in parts."""
SIZES = ((40, 40), (64, 32), (32, 32))


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A red, a green and a blue picture of different sizes."""
    folder = tmp_path_factory.mktemp("pictures")
    for number, (colour, size) in enumerate(zip(toy_data.COLOURS, SIZES, strict=True)):
        toy_data.picture(colour, 64, number).resize(size).save(folder / f"{number}.png")
    return folder


def read(folder: Path, **values: Any) -> Any:
    return read_example(Row(values, "x.jsonl, line 1", folder), KIND, DataSettings())


def rows_of(folder: Path) -> list[Any]:
    """Prompts of several lengths with one picture, two, and one."""
    return [
        read(folder, image="0.png", prompt="what?", completion="red"),
        read(folder, images=["1.png", "2.png"], prompt="and which are these?", completion="green, blue"),
        read(folder, image="2.png", prompt="?", completion="blue"),
    ]


def qwen(folder: Path) -> tuple[Any, Dataset]:
    processor = tiny_models.QwenProcessor()
    encoder = Encoder(KIND, 512, processor.tokenizer, processor.image_processor, processor)
    module = tiny_models.qwen_vl(processor)
    base = Base("qwen", module, "0" * 64, ("model.language_model.layers.0.self_attn.q_proj",), ())
    return personal(base), encoder.encode(rows_of(folder), ())


def test_gemma_is_told_which_tokens_are_an_images(tmp_path: Path) -> None:
    path = toy_data.write_captions(tmp_path / "data", 4, 0)
    base = tiny_models.save_gemma3(tmp_path / "gemma")
    model, data = loaded(settings_of(path, tmp_path, base, target_modules="q_proj"))
    batch = data.splits["train"].batch(torch.arange(3))
    image = model.module.get_submodule("model").config.image_token_id  # type: ignore[union-attr]
    assert torch.equal(batch.inputs["token_type_ids"], (batch.inputs["input_ids"] == image).long())
    assert int(batch.inputs["token_type_ids"].sum()) == 3 * 4
    with torch.no_grad():
        given = model.logits(model.inputs(batch.inputs))
        one_way = model.logits({k: v for k, v in model.inputs(batch.inputs).items() if k != "token_type_ids"})
    assert float((given - one_way).abs().max()) > 1e-3  # so that the test could fail
    model.module.train()
    assert training.logits_of(model, batch).isfinite().all()


def test_an_example_with_flat_patches_gets_the_answer_that_it_gets_alone(pictures: Path) -> None:
    model, data = qwen(pictures)
    batch = data.batch(torch.arange(3))
    assert batch.inputs["image_grid_thw"].shape == (4, 3)
    assert batch.rows["image_grid_thw"].tolist() == [1, 2, 1]
    assert int(batch.rows["pixel_values"].sum()) == len(batch.inputs["pixel_values"])
    assert batch.inputs["mm_token_type_ids"].sum(dim=1).tolist() == [4, 12, 4]
    with torch.no_grad():
        together = training.logits_of(model, batch)
        alone = [training.logits_of(model, data.batch(torch.tensor([i]))) for i in range(3)]
        taken = [training.logits_of(model, batch.batch(torch.tensor([i]))) for i in range(3)]
    assert torch.allclose(together, torch.cat(alone), atol=1e-4)
    assert torch.allclose(together, torch.cat(taken), atol=1e-4)
    processor, inputs = tiny_models.QwenProcessor(), batch.batch(torch.tensor([1])).inputs
    direct = processor(
        images=[toy_data.PIL.Image.open(pictures / f"{n}.png") for n in (1, 2)],
        text=["<|image_pad|>\n<|image_pad|>and which are these?green, blue"],
        return_tensors="pt",
    )
    for name in ("pixel_values", "image_grid_thw"):
        assert torch.equal(inputs[name], direct[name])
    assert torch.equal(inputs["input_ids"][:, :-1], direct["input_ids"])  # and an end token


def test_flat_patches_are_joined_and_measured_example_by_example(pictures: Path) -> None:
    model, data = qwen(pictures)
    both = join([data.subset(torch.tensor([1, 0])), data.subset(torch.tensor([2]))]).batch(torch.tensor([2, 0, 1]))
    plain = data.batch(torch.tensor([2, 1, 0]))
    for name in plain.inputs:
        assert torch.equal(both.inputs[name], plain.inputs[name]), name
    layout = model.layout
    each = fisher.example_gradients(model, "local", layout, data.batch(torch.arange(3)))
    last = fisher.example_gradients(model, "local", layout, data.batch(torch.tensor([2])))
    assert torch.allclose(each[2:], last, atol=1e-5)
    assert not torch.allclose(each[1], each[2])


def test_what_is_written_about_images_does_not_depend_on_company(pictures: Path) -> None:
    model, data = qwen(pictures)
    client = ClientData(
        "x", KIND.name, {}, decode=lambda ids: " ".join(map(str, ids.tolist())), generate_examples=3, max_new_tokens=4
    )
    together = evaluation.write(model, data, client, 3)
    alone = evaluation.write(model, data, client, 1)
    assert together == alone
    assert len(set(together.texts)) > 1


def test_images_that_messages_name_and_prompts_with_places(pictures: Path) -> None:
    user = [{"type": "image", "path": "0.png"}, {"type": "text", "text": "?"}, {"type": "image", "image": "1.png"}]
    turns = [{"role": "user", "content": user}, {"role": "assistant", "content": "both"}]
    found = read(pictures, messages=turns)
    assert [Path(image).name for image in found.images] == ["0.png", "1.png"]
    with pytest.raises(DataError, match="2 places for images in the messages, and 1 images"):
        read(pictures, messages=turns, image="0.png")
    with pytest.raises(DataError, match="an image of the messages: there is no file"):
        read(pictures, messages=[{"role": "user", "content": [{"type": "image", "path": "9.png"}]}, turns[1]])
    processor = tiny_models.QwenProcessor()
    encoder = Encoder(KIND, 512, processor.tokenizer, processor.image_processor, processor)
    asked = ("a<|image_pad|>b", "ab")
    for prompt, before in zip(asked, (2, 1), strict=True):
        ids = encoder.encode([read(pictures, image="0.png", prompt=prompt, completion="c")], ()).inputs["input_ids"][0]
        assert (ids == processor.image_token_id).nonzero()[0].item() == before
        assert int((ids == processor.image_token_id).sum()) == 4
    with pytest.raises(DataError, match=r"1 times <\|image_pad\|> in the prompt, and 2 images"):
        encoder.encode([read(pictures, images=["0.png", "1.png"], prompt=asked[0], completion="c")], ())


def test_targets_beside_images_are_the_completion_and_its_end(pictures: Path) -> None:
    _, data = qwen(pictures)
    tokenizer = tiny_models.QwenProcessor().tokenizer
    found = [tokenizer.decode(labels[labels != IGNORED]) for labels in data.labels]
    assert found == ["red</s>", "green, blue</s>", "blue</s>"]


@pytest.mark.parametrize("architecture", ["qwen", "gemma"])
def test_losses_of_a_vision_language_model_need_few_logits(architecture: str, pictures: Path, tmp_path: Path) -> None:
    if architecture == "qwen":
        model, split = qwen(pictures)
    else:
        path = toy_data.write_captions(tmp_path / "data", 4, 0)
        base = tiny_models.save_gemma3(tmp_path / "gemma")
        model, data = loaded(settings_of(path, tmp_path, base, target_modules="q_proj"))
        split = data.splits["train"]
    batch = split.batch(torch.arange(3))
    inputs = model.inputs(batch.inputs)
    model.target_losses.chunk_bytes = 2 * 4 * model.module.config.get_text_config().vocab_size  # type: ignore[union-attr, operator]
    rows: list[int] = []
    head: Any = model.module.get_output_embeddings()  # type: ignore[operator]
    with torch.no_grad():
        expected = functional.cross_entropy(
            at_targets(model.logits(inputs), batch.labels).float(),
            batch.labels[:, 1:][target_mask(batch.labels)],
            reduction="none",
        )
        model.at_targets(inputs, batch.labels)  # the first time it tries
        head.register_forward_hook(lambda module, given, output: rows.append(output.shape[-2]))
        found = model.at_targets(inputs, batch.labels).losses()
    assert not model.target_losses.reason
    assert max(rows) == 2
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("asked", ["<image>what?", "what<image>\n?", "a <image> and <image>"])
def test_the_word_image_in_a_question_is_the_images_place(asked: str, pictures: Path) -> None:
    """As LLaVA's data have it: the ids are those of the same messages in parts."""
    images = ["0.png"] * asked.count("<image>")
    parts: list[dict[str, str]] = []
    for number, text in enumerate(asked.split("<image>")):
        parts += [{"type": "image"}] * (number > 0) + [{"type": "text", "text": text}] * bool(text)
    answer = {"role": "assistant", "content": "an <image> that is written"}
    processor = tiny_models.QwenProcessor()
    processor.chat_template = PARTS
    chat = ChatTemplate(processor, processor.tokenizer, ["</s>"])
    encoder = Encoder(KIND, 512, processor.tokenizer, processor.image_processor, processor, chat=chat)
    rows = [[{"role": "user", "content": content}, answer] for content in (asked, parts)]
    one, other = (
        encoder.encode([read(pictures, messages=messages, images=images)], ()).inputs["input_ids"] for messages in rows
    )
    assert one.tolist() == other.tolist()
    assert int((one == processor.image_token_id).sum()) == 4 * len(images)
    prompt = read(pictures, images=images, prompt=asked, completion="red")
    plain = Encoder(KIND, 512, processor.tokenizer, processor.image_processor, processor)
    for found in (encoder, plain):
        assert "<image>" not in found.decode(found.encode([prompt], ()).inputs["input_ids"][0])
    with pytest.raises(DataError, match=f"{len(images)} times <image> in the messages, and 3 images"):
        encoder.encode([read(pictures, messages=rows[0], images=["0.png"] * 3)], ())
