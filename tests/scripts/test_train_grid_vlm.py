"""The training of the tiny model on the grid task, with a far smaller model and a few steps."""

from __future__ import annotations

import json
import multiprocessing
from dataclasses import replace
from pathlib import Path
from typing import Any

import grid_vqa as task
import numpy as np
import pytest
import torch
import train_grid_vlm as training
from transformers import AutoModelForImageTextToText, AutoProcessor

SMALL = replace(
    training.Recipe(),
    hidden=64,
    layers=2,
    heads=1,
    kv_heads=1,
    mlp=64,
    vision_hidden=32,
    vision_layers=1,
    vision_heads=1,
    vision_mlp=32,
    rows=2,
    passes=2,
    branches=4,
    vision_steps=3,
)


@pytest.fixture(autouse=True)
def _process() -> Any:
    """The trainer restricts this process to one thread, and its children end when it does."""
    threads, children = torch.get_num_threads(), set(multiprocessing.active_children())
    yield
    torch.set_num_threads(threads)
    for child in set(multiprocessing.active_children()) - children:
        child.terminate()
        child.join()


def _train(tmp_path: Path, steps: int, processes: int = 1) -> dict[str, Any]:
    checkpoint = tmp_path / "checkpoint.pt"
    return training.run(SMALL, 0, steps, None, tmp_path / "out", (2, 2, 2), checkpoint, processes)


@pytest.fixture(scope="module")
def random_model(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """An untrained model whose attention and MLPs do something, as loaded from its directory."""
    model = training.build_model(SMALL, seed=1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(("o_proj.weight", "down_proj.weight")):
                parameter.normal_(std=0.1)
    directory = tmp_path_factory.mktemp("model")
    training.write_checkpoint(model, directory)
    return (
        AutoModelForImageTextToText.from_pretrained(directory, dtype="float32"),
        AutoProcessor.from_pretrained(directory),
    )


@pytest.mark.parametrize("processes", [1, 2])
def test_training_writes_a_model_and_resumes(tmp_path: Path, processes: int) -> None:
    first = _train(tmp_path, 2, processes)
    assert first["steps"] == 2
    weights = (tmp_path / "out" / "model.safetensors").read_bytes()
    second = _train(tmp_path, 3, processes)
    assert second["steps"] == 3
    assert second["minutes"] >= first["minutes"]
    assert (tmp_path / "out" / "model.safetensors").read_bytes() != weights
    assert json.loads((tmp_path / "out" / "training.json").read_text()) == second
    assert set(second["exact_match_by_images"]["1"]) == set(task.FAMILIES) - set(
        task.TWO_IMAGE_FAMILIES
    )
    assert set(second["exact_match_by_images"]["3"]) == set(task.FAMILIES)
    card = (tmp_path / "out" / "README.md").read_text()
    share = second["exact_match_by_images"]["2"]["same"]
    assert f"| `same` | {task.FAMILIES['same']} |  | {share:.3f} |" in card
    assert (tmp_path / "out" / "sample.png").stat().st_size > 0


def test_a_checkpoint_of_another_recipe_is_refused(tmp_path: Path) -> None:
    trainer = training.Trainer(SMALL, 0, tmp_path / "c.pt", processes=1)
    trainer.save()
    with pytest.raises(ValueError, match="another recipe"):
        training.Trainer(replace(SMALL, branches=2), 0, tmp_path / "c.pt", processes=1)


def test_loss_falls(tmp_path: Path) -> None:
    quick = replace(SMALL, muon_lr=5e-3, adam_lr=5e-3)
    trainer = training.Trainer(quick, 0, tmp_path / "c.pt", processes=1)
    losses = []
    for _ in range(40):
        trainer.advance(0.0)
        losses.append(trainer.loss)
    assert np.mean(losses[-5:]) < 0.9 * np.mean(losses[:3])


def test_processes_compute_the_same_step(tmp_path: Path) -> None:
    weights = []
    for processes in (1, 2):
        trainer = training.Trainer(SMALL, 0, tmp_path / f"{processes}.pt", processes)
        for _ in range(2):
            trainer.advance(0.0)
        weights.append(torch.cat([p.flatten() for p in trainer.model.parameters()]))
    assert torch.allclose(*weights, atol=1e-4)


def test_encoding_is_that_of_the_processor_and_the_model(random_model: Any) -> None:
    model, processor = random_model
    rng = np.random.default_rng(0)
    for n_images in (1, 2, 3):
        question = task.make_question(rng, "colour", n_images)
        inputs = processor(text=[question.text()], images=question.images(), return_tensors="pt")
        ids, positions = training.encode(question.parts)
        assert inputs["input_ids"][0].tolist() == ids
        assert training.VOCABULARY[training.UNKNOWN] not in ids
        wanted, _ = model.model.get_rope_index(
            inputs["input_ids"], inputs["mm_token_type_ids"], inputs["image_grid_thw"]
        )
        assert np.array_equal(wanted[:, 0].numpy(), positions)
        patches = training.tile_patches()[training.tile_indices(question.grids)]
        assert torch.allclose(inputs["pixel_values"], patches.flatten(0, 2), atol=1e-5)
        starts = [positions[0, i] for i, t in enumerate(ids) if t == model.config.image_token_id]
        assert sorted(set(starts)) == task.image_positions(question.parts)


def test_a_branch_computes_what_a_prompt_of_its_own_would(random_model: Any) -> None:
    model, _ = random_model
    tiles = training.tile_patches()
    shares = np.ones(len(training.FAMILIES))
    batch = training.make_batch(np.random.default_rng(0), 2, 2, SMALL, shares)
    with torch.no_grad():
        logits, _ = training.forward(model, batch, tiles)
        for index in range(0, len(batch.targets), 11):
            row, at, *_ = batch.targets[index].tolist()
            start = at - (at - batch.prefix) % batch.branch
            ids = torch.cat([batch.ids[row, : batch.prefix], batch.ids[row, start : at + 1]])[None]
            single = model(
                input_ids=ids,
                pixel_values=tiles[batch.tiles.view(2, 2, -1)[row]].flatten(0, 2),
                image_grid_thw=torch.tensor([[1, 12, 12]] * 2),
                mm_token_type_ids=(ids == model.config.image_token_id).int(),
            ).logits[0, -1]
            assert torch.allclose(single, logits[index], atol=1e-4)


def test_targets_are_the_answers(random_model: Any) -> None:
    _, processor = random_model
    rng = np.random.default_rng(2)
    shares = np.ones(len(training.FAMILIES))
    batch = training.make_batch(rng, 3, 2, SMALL, shares)
    answers = {"yes", "no", *task.COLOURS, *task.SHAPES, *task.CELLS, *task.LABELS, *task.NUMBERS}
    for row, at, answer, family in batch.targets.tolist():
        word = processor.tokenizer.decode([answer])
        if family == len(training.FAMILIES):
            assert word == training.END
            continue
        assert word in answers
        follows = batch.prefix + (at + 1 - batch.prefix) // batch.branch * batch.branch
        if at + 1 > follows:  # else the branch ends here
            assert batch.ids[row, at + 1] == answer


def test_muon_makes_updates_nearly_orthogonal() -> None:
    matrices = torch.randn(3, 16, 40, generator=torch.Generator().manual_seed(0))
    values = torch.linalg.svdvals(training._orthogonalise(matrices))
    assert values.min() > 0.5
    assert values.max() < 1.5


def test_chat_template_gives_the_layout_of_training(random_model: Any) -> None:
    _, processor = random_model
    question = task.make_question(np.random.default_rng(0), "has", 2)
    content = [
        {"type": "image"} if isinstance(part, int) else {"type": "text", "text": part}
        for part in question.parts
    ]
    messages = [{"role": "user", "content": content}]
    assert processor.apply_chat_template(messages, add_generation_prompt=True) == question.text()


def test_first_heads_attend_one_and_two_tokens_back() -> None:
    model = training.build_model(training.Recipe(), seed=0)
    language = model.model.language_model
    attention = language.layers[0].self_attn
    x = torch.zeros(1, 12, training.Recipe().hidden)
    cos, sin = language.rotary_emb(x, torch.arange(12).expand(3, 1, -1))
    query, key = (
        projection(x).view(1, 12, -1, training.HEAD_DIM).transpose(1, 2)
        for projection in (attention.q_proj, attention.k_proj)
    )
    query, key = training.apply_rotary_pos_emb(query, key, cos, sin)
    weights = (query[0, :2] @ key[0, :1].mT * attention.scaling).tril().softmax(-1)
    assert weights[0, -1, -2] > 0.9
    assert weights[1, -1, -3] > 0.9


def test_matching_heads_attend_to_the_token_that_resembles_the_one_that_asks() -> None:
    model = training.build_model(training.Recipe(), seed=0)
    language = model.model.language_model
    words = language.embed_tokens.weight[10:70]
    x = torch.cat([words, words[20:21]])[None]
    cos, sin = language.rotary_emb(x, torch.arange(61).expand(3, 1, -1))
    for layer in language.layers[1:]:
        attention, h = layer.self_attn, layer.input_layernorm(x)
        query, key = (
            projection(h).view(1, 61, -1, training.HEAD_DIM).transpose(1, 2)
            for projection in (attention.q_proj, attention.k_proj)
        )
        query, key = training.apply_rotary_pos_emb(query, key, cos, sin)
        scores = query[0, ::2, -1:] @ key[0].mT * attention.scaling
        assert (scores[..., :60].argmax(-1) == 20).all()


def test_the_vision_encoder_learns_to_show_the_words_of_a_cell() -> None:
    recipe = replace(training.Recipe(), vision_steps=40)
    model = training.build_model(recipe, seed=0)
    tiles = training.tile_patches()
    assert training.train_vision(model, tiles, recipe, seed=0) > 0.5
