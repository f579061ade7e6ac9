"""Golden cases of embeddings' metrics and of the JSON documents on losses and learning rates."""

import json
import re
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from flowcore.models.xut import XUDiT, XUTConfig
from flowcore.text.pooling import pool_states
from tests.golden.compare import CHAIN_LIMIT, Case, Checked, Metadata, Options, Tensors
from training.analysis import fit_power_law, similarities
from training.optim import fan_in, lr_multiplier

Document = Mapping[str, Any]


def embedding_cases(tensors: Tensors, metadata: Metadata, _options: Options) -> Iterator[Case | Checked]:
    """The pooled vectors, and the similarities that the metadata holds."""
    pooled = pool_states(tensors["input.hidden"], tensors["input.mask"])
    yield Case("output.pooled", pooled[:, 0], tensors["output.pooled"])
    found = similarities(tensors["input.embeddings"], tensors["input.group"])
    expected = json.loads(metadata["metrics"])
    for name, value in expected.items():
        if name == "cohesion":
            yield keys_match("cohesion", [str(group) for group in found.cohesion], list(value))
            pairs = {f"cohesion.{group}": (found.cohesion.get(int(group)), value[group]) for group in value}
        else:
            pairs = {name: (getattr(found, name), value)}
        for label, (actual, wanted) in pairs.items():
            yield number(f"metrics.{label}", actual, wanted)


def document_cases(document: Document, _options: Options) -> Iterator[Case | Checked]:
    """Every number of a JSON file that is no key table."""
    kinds = {"loss_runs": loss_runs, "lr_schedules": lr_schedules, "fan_in_lr": fan_in_rates}
    yield from kinds[document["kind"]](document)


def loss_runs(document: Document) -> Iterator[Case | Checked]:
    """The fit to each run; the filter of the points is part of the definition."""
    found = re.fullmatch(r"loss < ([\d.]+) and step >= (\d+)", document["filter"])
    yield Checked("filter", "" if found else f"not understood: {document['filter']}")
    max_loss, min_step = (float(found[1]), int(found[2])) if found else (1.0, 200)
    for run, record in document["runs"].items():
        fit = fit_power_law(record["step"], record["loss"], max_loss=max_loss, min_step=min_step)
        for name, wanted in record["fit"].items():
            yield number(f"{run}.fit.{name}", getattr(fit, name), wanted, CHAIN_LIMIT)


def lr_schedules(document: Document) -> Iterator[Case | Checked]:
    """Factors and rates at the steps that are listed."""
    factor = document["hdm_factor"]
    for step, wanted in factor["steps"].items():
        actual = lr_multiplier(
            "cosine",
            int(step),
            steps=factor["end"],
            warmup_steps=factor["warmup"],
            minimum=factor["min_value"],
        )
        yield number(f"hdm_factor.{step}", actual, wanted)
    seed = document["seed_logged_lr"]
    for step, wanted in seed["steps"].items():
        share = lr_multiplier("cosine", int(step), steps=seed["total"], warmup_steps=seed["warmup"])
        yield number(f"seed_logged_lr.{step}", share * seed["base"] / seed["dim"], wanted)


def fan_in_rates(document: Document) -> Iterator[Case | Checked]:
    """The rate of every parameter under the rule base / fan-in."""
    model = XUDiT(XUTConfig.from_dict(document["config"]), device="meta")
    parameters = dict(model.named_parameters())
    base = document["base_lr"]
    yield keys_match("params", list(parameters), list(document["params"]))
    yield number("global_rule_lr", base / document["config"]["dim"], document["global_rule_lr"])
    for name, wanted in document["params"].items():
        if name in parameters:
            inputs = fan_in(parameters[name].shape)
            yield number(f"{name}.fan_in", inputs, wanted["fan_in"])
            yield number(f"{name}.lr", base / inputs, wanted["lr"])


def keys_match(what: str, actual: list[str], wanted: list[str]) -> Checked:
    """Whether two sets of names are the same."""
    different = sorted(set(actual) ^ set(wanted))
    return Checked(f"{what} names", f"{len(different)} differ, first {different[0]}" if different else "")


def number(
    name: str, actual: float | None, wanted: float | None, limit: float | None = None
) -> Case | Checked:
    """A comparison of two numbers, or of None with None."""
    if actual is None or wanted is None:
        return Checked(name, "" if actual == wanted else f"{actual} instead of {wanted}")
    return Case(name, _scalar(actual), _scalar(wanted), limit)


def _scalar(value: float) -> Tensor:
    return torch.tensor([value], dtype=torch.int64 if isinstance(value, int) else torch.float64)
