"""Exo's objective: keyed draws, kinds of batches, its terms, checkpointing, tasks, a trunk by reference."""

import json
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from flowcore.errors import CheckpointError, ConfigError
from flowcore.models.exo.labels import changed_cells
from tests.exo_trunk import REFERENCE, TRUNK, write_trunk
from tests.tiny import VAE, write_parts
from tests.unit.training.workspace import fitted, run_config, write_edits, write_images
from training.assemble import build_objective, prepare
from training.objectives.exo import ExoObjective
from training.stop import StopFlag

CPU = torch.device("cpu")
BATCH = slice(0, 4)
SEEN = "a black circle"
"""First line of all answers."""
MASKED = ("adapters.", "memory.", "projector.", "tokens.", "trunk.", "edit_head.")
"""What a mask follows from: all but the diffusion head."""


SPOKEN = (
    ({"task": "language"}, "task language"),
    ({"task": "rewrite"}, "task rewrite"),
    ({"task": "projector", "words": 1.0}, "words"),
)
"""Sections `train.exo` that take captions and a trunk of one's own."""


def objective(folder: Path, train: dict[str, Any] | None = None, **sections: Any) -> ExoObjective:
    """Of the tiny preset on plain pictures and edits, with open gates and heads that are not zero."""
    if not (folder / "images").exists():
        write_edits(folder / "images")
    model = {"arch": "exo", **sections.pop("model", {})}
    config = run_config(folder, model=model, buckets={"resolution": 64}, train=train or {}, **sections)
    made = build_objective(prepare(config), CPU, StopFlag())
    assert isinstance(made, ExoObjective)
    with torch.no_grad():
        for number, parameter in enumerate(made.module.parameters()):
            noise = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(number))
            parameter.add_(0.1 * noise)
    return made


def rewriter(folder: Path, train: dict[str, Any] | None = None) -> ExoObjective:
    """Of a model that rewrites, on edits that say what they show."""
    write_edits(folder / "images")
    for source in (folder / "images").glob("*.source.png"):
        name = source.name.split(".")[0]
        facts = json.dumps({"answer": f"{SEEN}\nshows {name}"})
        (folder / "images" / f"{name}.json").write_text(facts, encoding="utf-8")
    return objective(folder, train, model={"overrides": {"rewrites": True}})


def weights(
    diffusion: float = 0.0, edit: float = 0.0, perceptual: float = 0.0, **more: Any
) -> dict[str, Any]:
    return {"exo": {"diffusion": diffusion, "edit": edit, "perceptual": perceptual, **more}}


def step_of(made: ExoObjective, *, is_edit: bool, iterations: int = 2) -> int:
    """The first step with edits or plain samples, and that many iterations."""
    return next(
        step
        for step in range(1000)
        if made._is_edit(made.draw(step, BATCH)) == is_edit and made.iterations(step) == iterations
    )


def gradients(made: ExoObjective, loss: Tensor) -> dict[str, Tensor]:
    loss.backward()
    found = {n: p.grad.clone() for n, p in made.module.named_parameters() if p.grad is not None}
    made.module.zero_grad(set_to_none=True)
    return found


def test_chance_depends_on_the_step_alone(tmp_path: Path) -> None:
    made = objective(tmp_path, {"exo": {"iterations": [1, 3]}})
    with torch.no_grad():
        first = [float(made.loss(step, BATCH)) for step in range(3)]
        torch.manual_seed(99)
        again = [float(made.loss(step, BATCH)) for step in reversed(range(3))]
    assert first == again[::-1]
    drawn = [made.iterations(step) for step in range(300)]
    assert all(80 < drawn.count(number) < 120 for number in (1, 2, 3))
    other = objective(tmp_path, {"exo": {"iterations": [1, 3]}}, seed=1)  # type: ignore[arg-type]
    assert [made.iterations(step) for step in range(40)] == drawn[:40]
    assert drawn[:40] != [other.iterations(step) for step in range(40)]


def test_a_batch_holds_edits_with_their_sources_or_plain_samples(tmp_path: Path) -> None:
    made = objective(tmp_path)
    kinds = []
    for step in range(10):
        draw = made.draw(step, BATCH)
        sources = [made.data.samples[number].source for number in draw.numbers]
        told = made.conditioning(draw)
        kinds.append(sources[0] is not None)
        assert all((source is not None) == kinds[-1] for source in sources)
        assert ("pixels" in told.extras) == kinds[-1]
    assert 0 < sum(kinds) < 10


@pytest.mark.parametrize("is_edit", [False, True])
@pytest.mark.parametrize("size", [1, 2])
def test_parts_of_a_batch_add_up_to_the_whole(tmp_path: Path, size: int, is_edit: bool) -> None:
    made = objective(tmp_path)
    step = step_of(made, is_edit=is_edit)
    with torch.no_grad():
        whole = float(made.loss(step, BATCH))
        parts = [float(made.loss(step, slice(first, first + size))) for first in range(0, 4, size)]
    assert sum(parts) * size / 4 == pytest.approx(whole, rel=1e-5)


@pytest.mark.parametrize("is_edit", [False, True])
def test_the_loss_is_the_weighted_sum_of_its_terms(tmp_path: Path, is_edit: bool) -> None:
    write_parts(tmp_path)
    sections = {
        "encoders": {"vae": str(tmp_path / VAE)},
        "model": {"overrides": {"latent_channels": 4}},
    }
    terms = [(1.0, 0.0, 0.0), (0.0, 1.0, 0.0), (0.0, 0.0, 1.0), (0.9, 0.1, 0.05)]
    times = {"timesteps": {"law": "uniform", "shift": 0.3}}
    losses = []
    for term in terms:
        made = objective(tmp_path, {**weights(*term), **times}, **sections)
        step = step_of(made, is_edit=is_edit)
        with torch.no_grad():
            losses.append(float(made.loss(step, BATCH)))
            draw = made.draw(step, BATCH)
            velocity = made.predict(draw, made.conditioning(draw))
    diffusion, edit, perceptual, whole = losses
    assert min(losses) > 0
    assert diffusion == pytest.approx(float(functional.mse_loss(velocity, draw.sample.velocity)), rel=1e-6)
    assert whole == pytest.approx(0.9 * diffusion + 0.1 * edit + 0.05 * perceptual, rel=1e-5)


def test_edits_of_plain_samples_are_measured_against_the_first_iteration(tmp_path: Path) -> None:
    with_edits, without = (objective(tmp_path, weights(edit=1.0, plain_edits=told)) for told in (True, False))
    for iterations in (1, 2):
        step = step_of(without, is_edit=False, iterations=iterations)
        with torch.no_grad():
            draw = without.draw(step, BATCH)
            mask = without._step(draw, without._prefix(draw, without.conditioning(draw)), iterations).mask
            price = 0.1 * float(mask.mean())
            assert float(without.loss(step, BATCH)) == pytest.approx(price, rel=1e-5)
            assert (float(with_edits.loss(step, BATCH)) > 1.5 * price) == (iterations > 1)


@pytest.mark.parametrize("task", ["velocity", "masks"])
def test_iterations_can_learn_each_for_itself(tmp_path: Path, task: str) -> None:
    asked = {"task": task, "iterations": [3, 3]}
    through, own = (objective(tmp_path, {"exo": {**asked, "gradient": kind}}) for kind in ("all", "own"))
    step = step_of(own, is_edit=True, iterations=3)
    losses = through.loss(step, BATCH), own.loss(step, BATCH)
    assert torch.equal(*losses)
    name = "edit_head.delta2.weight"
    first, second = (
        gradients(made, loss).get(name) for made, loss in zip((through, own), losses, strict=True)
    )
    assert first is not None
    assert first.abs().max() > 0
    # of masks alone no delta tells: it is the next iteration that looks at it
    assert (second is None or not second.any()) == (task == "masks")


def test_the_mask_learns_labels_and_price(tmp_path: Path) -> None:
    found = {}
    for name, asked in {
        "plain": {"labels": 0.0, "sparsity": 1e-9},
        "labels": {"labels": 1.0, "sparsity": 1e-9},
        "price": {"labels": 0.0, "sparsity": 10.0},
    }.items():
        made = objective(tmp_path, weights(edit=1.0, **asked))
        found[name] = gradients(made, made.loss(step_of(made, is_edit=True), BATCH))["edit_head.mask.bias"]
    assert (found["labels"] - found["plain"]).abs() > 1e-3
    assert found["price"] - found["plain"] > 1e-3


def test_masks_are_learned_from_edits_alone_and_in_every_iteration(tmp_path: Path) -> None:
    made = objective(tmp_path, {"exo": {"task": "masks", "iterations": [2, 2]}})
    kept: list[Tensor] = []
    with torch.no_grad():
        for step in range(8):
            draw = made.draw(step, BATCH)
            assert made._is_edit(draw)
            source, clean = made._source_latents(draw), draw.clean
            noised = made._partly_source(draw, source)
            eps = draw.sample.velocity + clean
            shown = (noised - draw.sigma[:, None, None, None] * eps) / (1 - draw.sigma[:, None, None, None])
            nearer = (shown - source).abs() < (shown - clean).abs()
            torch.testing.assert_close(shown, torch.where(nearer, source, clean), atol=1e-3, rtol=1e-3)
            kept.append(nearer.float().mean(dim=(1, 2, 3)))
            step_draw = replace(draw, sample=replace(draw.sample, noised=noised))
            result = made._step(step_draw, made._prefix(draw, made.conditioning(draw)), 2)
            labels = changed_cells(source, clean).float().flatten(1)
            expected = [functional.binary_cross_entropy(one.mask, labels) for one in result.iterations]
            assert float(made.loss(step, BATCH)) == pytest.approx(float(sum(expected)) / 2, rel=1e-5)
    shares = torch.cat(kept)  # of what is the source's still, in 2 x 2 cells
    assert float(shares.max()) > 0.7
    assert 0 < float((shares > 0.05).float().mean()) < 0.5


@pytest.mark.parametrize("task", ["masks", "rewrite"])
def test_masks_and_rewriting_need_edits(tmp_path: Path, task: str) -> None:
    write_images(tmp_path / "images", 8)
    with pytest.raises(
        ConfigError, match=rf"train\.exo\.task {task} must have a dataset with source pictures"
    ):
        objective(tmp_path, {"exo": {"task": task}})


def test_velocity_can_be_learned_without_edits(tmp_path: Path) -> None:
    made = objective(tmp_path, weights(diffusion=1.0, edits=False))
    assert not any(made._is_edit(made.draw(step, BATCH)) for step in range(20))
    pictures = tmp_path / "images"
    for plain in set(pictures.glob("??.png")) - {pictures / f"{n:02d}.png" for n in (1, 3, 5)}:
        plain.unlink()
        plain.with_suffix(".txt").unlink()
    with pytest.raises(ConfigError, match=r"train\.exo\.edits must be true for datasets of edits alone"):
        objective(tmp_path, weights(diffusion=1.0, edits=False))


def test_the_source_is_learned_beside_the_velocity_where_it_is_asked_for(tmp_path: Path) -> None:
    for weight in (0.0, 0.5):
        made = objective(tmp_path, weights(source=weight))
        step = step_of(made, is_edit=True)
        loss = made.loss(step, BATCH)
        with torch.no_grad():
            draw = made.draw(step, BATCH)
            features = made._prefix(draw, made.conditioning(draw)).features
            estimate = made.exo.projector.latents(features)
        error = functional.mse_loss(estimate, made._source_latents(draw))
        assert float(loss.detach()) == pytest.approx(weight * float(error), rel=1e-5)
        with torch.no_grad():
            assert float(made.loss(step_of(made, is_edit=False), BATCH)) == 0


@pytest.mark.parametrize("is_edit", [False, True])
def test_checkpointing_changes_no_bit(tmp_path: Path, is_edit: bool) -> None:
    plain, saving = (objective(tmp_path, {"gradient_checkpointing": told}) for told in (False, True))
    step = step_of(plain, is_edit=is_edit)
    expected, found = (gradients(made, made.loss(step, BATCH)) for made in (plain, saving))
    assert expected.keys() == found.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_captions_are_dropped_but_not_pictures(tmp_path: Path) -> None:
    made = objective(tmp_path, {"cond_dropout": 1.0})
    draw = made.draw(step_of(made, is_edit=True), BATCH)
    assert draw.captions == [""] * 4
    assert made.conditioning(draw).extras["pixels"].shape[0] == 4


@pytest.mark.parametrize(
    ("task", "trained"),
    [
        ("projector", ("projector.", "trunk.visual.")),
        ("language", ("trunk.language_model.",)),
        ("rewrite", ("projector.", "trunk.")),
        ("masks", MASKED),
    ],
)
def test_a_task_has_gradients_for_its_part_and_can_be_learned(
    tmp_path: Path, task: str, trained: tuple[str, ...]
) -> None:
    made = rewriter(tmp_path, {"exo": {"task": task, "source": 1.0}, "cond_dropout": 0.0})
    found = gradients(made, made.loss(0, BATCH))
    assert all(name.startswith(trained) for name in found)
    assert any(name.startswith(trained[-1]) for name in found)
    losses = fitted(made, 25, 5)
    assert sum(losses[-5:]) < 0.8 * sum(losses[:5])


def test_a_model_that_rewrites_draws_what_edits_show(tmp_path: Path) -> None:
    made = rewriter(tmp_path)
    draw = made.draw(step_of(made, is_edit=True), BATCH)
    told = made.conditioning(draw)
    shown = [f"shows {made.data.samples[n].path.stem}" for n in draw.numbers]
    expected = made.chat.read(
        ["" if d else text for d, text in zip(draw.dropped, shown, strict=True)], made._sources(draw.numbers)
    )
    assert torch.equal(told.context, expected.context)
    words = float(made._words_loss(draw)[0].detach())
    with torch.no_grad():
        plain, whole = (
            float(rewriter(tmp_path, weights(diffusion=1.0, **more)).loss(draw.step, BATCH))
            for more in ({}, {"rewrite": 0.5})
        )
    assert whole == pytest.approx(plain + 0.5 * words, rel=1e-5)


def test_rewriting_needs_words_and_a_model_for_them(tmp_path: Path) -> None:
    for train in ({"exo": {"task": "rewrite"}}, {"exo": {"rewrite": 0.1}}):
        with pytest.raises(ConfigError, match="must not learn to rewrite, got a model with rewrites: false"):
            objective(tmp_path, train)
        with pytest.raises(ConfigError, match=r'which is not described; add its description as "target" to '):
            objective(tmp_path, train, model={"overrides": {"rewrites": True}})


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_a_trunk_by_reference_stays_frozen_and_its_changes_learn(tmp_path: Path, precision: str) -> None:
    made = objective(
        tmp_path,
        model={"overrides": {**REFERENCE, "lora_rank": 4}},
        encoders={"text": str(write_trunk(tmp_path / "trunk"))},
        precision=precision,
    )
    assert made.exo.trunk is not None
    kind = getattr(torch, precision)
    assert all(p.dtype == kind for p in made.exo.trunk.parameters())
    for is_edit in (False, True):
        with torch.autocast("cpu", kind, enabled=precision != "float32"):
            loss = made.loss(step_of(made, is_edit=is_edit), BATCH)
        found = gradients(made, loss)
        assert not any(name.startswith("trunk.") for name in found)
        changes = [name for name in found if name.startswith("lora.")]
        assert len(changes) == 4 * 4 * 2
        assert all(torch.isfinite(found[name]).all() for name in found)
        assert all(found[name].abs().max() > 0 for name in changes if "layers.0" in name)


def test_without_changes_the_prompt_takes_no_gradient(tmp_path: Path) -> None:
    made = objective(
        tmp_path,
        model={"overrides": REFERENCE},
        encoders={"text": str(write_trunk(tmp_path / "trunk"))},
    )
    draw = made.draw(0, BATCH)
    prefix = made._prefix(draw, made.conditioning(draw))
    assert not any(part.requires_grad for layer in prefix.past.layers for part in layer)
    assert all(read.keys.requires_grad for read in prefix.reads)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")
def test_compiled_blocks_learn_as_they_would(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plain, traced = objective(tmp_path, {"batch_size": 4}).loss(0, BATCH), list[int]()

    def backend(graph: torch.fx.GraphModule, _: object) -> Callable[..., Any]:
        traced.append(len(graph.graph.nodes))
        return graph.forward

    monkeypatch.setattr("torch._inductor.cpp_builder.get_cpp_compiler", lambda: "c++")
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=backend))
    made = objective(tmp_path, {"batch_size": 4, "compile": True})
    assert not traced
    assert torch.allclose(made.loss(0, BATCH), plain, rtol=1e-6)
    assert len(traced) >= 2


def test_what_cannot_be_trained_is_named(tmp_path: Path) -> None:
    trunk = str(write_trunk(tmp_path / "trunk"))
    reference = {"overrides": REFERENCE}
    cases: list[tuple[dict[str, Any], str]] = [
        ({"encoders": {"text": "scenes-text"}}, "encoders.text must be bytes or left out for preset 'tiny'"),
        (
            {"model": reference},
            "encoders.text must name the trunk of preset 'tiny', a folder or a repository",
        ),
        *(
            (
                {"model": reference, "encoders": {"text": trunk}, "train": {"exo": told}},
                f"train.exo must not learn {name} for preset 'tiny', whose trunk is by reference",
            )
            for told, name in SPOKEN
        ),
    ]
    for sections, text in cases:
        with pytest.raises(ConfigError, match=text):
            objective(tmp_path, **sections)
    with pytest.raises(CheckpointError, match=r"encoders\.text: the trunk no/where must be a folder"):
        objective(tmp_path, model=reference, encoders={"text": "no/where"})
    with pytest.raises(
        ConfigError, match="must read bytes, with the image token 260, got 261; set embeds_tr"
    ):
        objective(tmp_path, model={"overrides": {"trunk": TRUNK}})
    (tmp_path / "trunk" / "tokenizer.json").unlink()
    with pytest.raises(CheckpointError, match=r"must come with its processor, got no tokenizer\.json"):
        objective(tmp_path, model=reference, encoders={"text": trunk})


def test_samples_follow_the_shift_of_the_training(tmp_path: Path) -> None:
    images = []
    for shift in (1.0, 3.0, 3.0):
        made = objective(tmp_path, {"timesteps": {"law": "uniform", "shift": shift}}, sampling={"steps": 2})
        with torch.no_grad():
            images.append(made.sample(["a red circle", "b"], StopFlag()))
    assert images[0].shape == (2, 3, 64, 64)
    assert torch.equal(images[1], images[2])
    assert not torch.allclose(images[0], images[1], atol=1e-3)
