"""The three runs behind `training.demo`, each with the loop, state and logging of `training.run`."""

from __future__ import annotations

import json
from collections.abc import Sequence
from copy import deepcopy
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import yaml
from torch import Tensor

from flowcore.vae.latent_spec import LatentSpec
from flowcore.weights.checkpoint import read_tensors
from training.assemble import recipes_of
from training.config import Data, LoopConfig, PartConfig, RunConfig, load_config
from training.data.folder import scan
from training.launch import Builder, Finisher, launch, pick_device
from training.log import read_metrics
from training.loop import Objective, Run
from training.objectives.flow_matching import FlowMatchingObjective
from training.scenes import parse_caption
from training.stages import stages_of, with_lengths
from training.stop import StopFlag

if TYPE_CHECKING:
    from diffusers import AutoencoderKL

    from training.objectives.autoencoder import AutoencoderObjective

CONFIGS = Path(__file__).parent / "configs"
VAE_NAME, TEXT_NAME = "scenes-vae", "scenes-text"
TIMED_STEPS = 12


@dataclass(frozen=True, slots=True)
class Request:
    """What the command line asked for; a short run of a model learns from single objects alone."""

    out: Path
    arch: str
    minutes: float | None
    assignments: tuple[str, ...]
    is_short: bool = False

    def part_config(self, name: str) -> PartConfig:
        """Configuration of a part's run, its paths below `out`."""
        paths = [
            f"datasets.{i}.path={self.out / 'scenes' / folder}" for i, folder in enumerate(("one", "two"))
        ]
        assignments = [f"output.dir={self.out}", *paths, *self.assignments]
        return load_config(PartConfig, CONFIGS / f"{name}.yaml", assignments)


def make_vae(request: Request, stop: StopFlag) -> bool:
    """Trains the autoencoder, then its decoder alone, and writes `out/scenes-vae/model.safetensors`.

    The second run leaves the latents as they are, and with them every model that was trained on them.
    """
    minutes = request.minutes
    runs = ((_make_autoencoder, 0.7), (_refine_decoder, 0.3))
    return all(make(replace(request, minutes=minutes and minutes * share), stop) for make, share in runs)


def _make_autoencoder(request: Request, stop: StopFlag) -> bool:
    """The autoencoder with the statistics of its latents."""
    from diffusers import AutoencoderKL

    from training.objectives.autoencoder import AutoencoderObjective, latent_statistics, preview_facts

    config = request.part_config("demo_vae")
    settings = yaml.safe_load((CONFIGS / "demo_vae_model.yaml").read_text(encoding="utf-8"))

    def build(device: torch.device, stop: StopFlag) -> AutoencoderObjective:
        torch.manual_seed(config.seed)
        return _autoencoder_objective(AutoencoderKL(**settings), request, config, device, stop)

    def finish(run: Run, _folder: Path) -> None:
        objective = run.objective
        assert isinstance(objective, AutoencoderObjective)
        with run.averaged(), torch.no_grad():
            mean, std = latent_statistics(objective)
            spec = LatentSpec(
                name=VAE_NAME, channels=len(mean), downscale=8, mean=tuple(mean), std=tuple(std)
            )
            _save_vae(request, objective, spec, preview_facts(objective, spec))

    return start(config, request, build, finish, stop)


def _refine_decoder(request: Request, stop: StopFlag) -> bool:
    """Further steps for the decoder of the autoencoder that lies in `out`; its encoder stays bit by bit."""
    from flowcore.vae.autoencoder import load_vae
    from training.objectives.autoencoder import AutoencoderObjective

    config = request.part_config("demo_vae_decoder")
    path = request.out / VAE_NAME / "model.safetensors"

    def build(device: torch.device, stop: StopFlag) -> AutoencoderObjective:
        module = load_vae(str(path), dtype=torch.float32).module
        module.decoder.requires_grad_(True)
        return _autoencoder_objective(module, request, config, device, stop)

    def finish(run: Run, _folder: Path) -> None:
        objective = run.objective
        assert isinstance(objective, AutoencoderObjective)
        facts = {k: v for k, v in read_tensors(path)[1].items() if k.startswith("flowcore.latent_rgb")}
        with run.averaged():
            _save_vae(request, objective, load_vae(str(path)).spec, facts)

    return start(config, request, build, finish, stop)


def _autoencoder_objective(
    module: AutoencoderKL, request: Request, config: PartConfig, device: torch.device, stop: StopFlag
) -> AutoencoderObjective:
    """The objective over as many training pictures as the options say, and all held-out ones."""
    from training.objectives.autoencoder import AutoencoderObjective

    count, crop = int(config.options["images"]), int(config.options["crop"])
    samples, _ = scan(config.datasets, Data())
    held_out, _ = scan(
        [config.datasets[0].model_copy(update={"path": str(request.out / "scenes" / "held-out")})], Data()
    )
    return AutoencoderObjective(
        module,
        samples[:: max(1, len(samples) // count)],
        held_out,
        seed=config.seed,
        batch_size=config.train.batch_size,
        crop=crop,
        device=device,
        stop=stop,
    )


def _save_vae(
    request: Request, objective: AutoencoderObjective, spec: LatentSpec, facts: dict[str, str]
) -> None:
    """Writes the module as it stands, in bfloat16."""
    from flowcore.vae.autoencoder import save_autoencoder

    module = deepcopy(objective.autoencoder).to("cpu", torch.bfloat16)
    save_autoencoder(request.out / VAE_NAME / "model.safetensors", module, spec, metadata=facts)


def start(
    config: LoopConfig,
    request: Request,
    build: Builder,
    finish: Finisher,
    stop: StopFlag,
    *,
    begin: Finisher | None = None,
) -> bool:
    """Starts or continues a part's run; with `--minutes` a new run gets as many steps as fit into them.

    A run that has begun keeps the number of steps it was started with.
    """
    begun = config.folder / "config.yaml"
    timed: Objective | None = None
    if begun.exists():
        train = yaml.safe_load(begun.read_text(encoding="utf-8"))["train"]
        lengths = [stage["steps"] for stage in train.get("stages", ())] or [train["steps"]]
    else:
        lengths = [stage.last - stage.first for stage in stages_of(config)]
        if request.minutes is not None:
            timed = build(pick_device(), stop)
            lengths = lengths_within(request.minutes * 60, config, timed)
    fitted = with_lengths(config, lengths)

    def build_fitted(device: torch.device, stop: StopFlag) -> Objective:
        objective = timed or build(device, stop)
        if isinstance(objective, FlowMatchingObjective) and isinstance(fitted, RunConfig):
            objective.recipes = recipes_of(fitted)  # whose stages may begin elsewhere
        return objective

    return launch(fitted, build_fitted, finish, stop, begin=begin)


def lengths_within(seconds: float, config: LoopConfig, objective: Objective) -> list[int]:
    """Steps of each stage, in their proportions, that take so long altogether."""
    stages = stages_of(config)
    planned = sum(
        (stage.last - stage.first) * seconds_per_step(config, objective, stage.first) for stage in stages
    )
    return [max(20, int((stage.last - stage.first) * seconds / planned)) for stage in stages]


def seconds_per_step(config: LoopConfig, objective: Objective, first: int = 0) -> float:
    """Median seconds of a few training steps, after which all is as it was."""
    before = {name: tensor.clone() for name, tensor in objective.module.state_dict().items()}
    may_change = {name: p.requires_grad for name, p in objective.module.named_parameters()}
    run = Run(config, objective, pick_device())
    run.step = first
    times = sorted(run.advance()["seconds"] for _ in range(TIMED_STEPS))
    objective.module.load_state_dict(before)
    for name, parameter in objective.module.named_parameters():
        parameter.requires_grad_(may_change[name])
    return times[TIMED_STEPS // 2]


def make_text(request: Request, stop: StopFlag) -> bool:
    """Trains the tiny Gemma-3 on the captions and writes `out/scenes-text/model.safetensors`."""
    from flowcore.text.gemma3 import Gemma3TextEncoder, build_text_model, save_text_encoder
    from flowcore.text.word_tokenizer import build_word_tokenizer
    from training.objectives.language import LanguageObjective
    from training.scenes.captions import vocabulary

    config = request.part_config("demo_text")
    samples, _ = scan(config.datasets, Data())
    tokenizer = build_word_tokenizer(vocabulary())

    def build(device: torch.device, stop: StopFlag) -> LanguageObjective:
        del stop
        torch.manual_seed(config.seed)
        model = build_text_model(_gemma_settings(config.options, len(tokenizer)))
        return LanguageObjective(
            Gemma3TextEncoder(model, tokenizer),
            [sample.caption for sample in samples],
            seed=config.seed,
            batch_size=config.train.batch_size,
            device=device,
        )

    def finish(run: Run, _folder: Path) -> None:
        objective = run.objective
        assert isinstance(objective, LanguageObjective)
        model = objective.encoder.model.eval().to(torch.bfloat16)
        save_text_encoder(request.out / TEXT_NAME / "model.safetensors", model, tokenizer)

    return start(config, request, build, finish, stop)


def _gemma_settings(options: dict[str, float], vocab_size: int) -> dict[str, Any]:
    """Settings of a Gemma3TextConfig from the run's options; rope, window and norms stay Gemma's."""
    return {
        "vocab_size": vocab_size,
        "hidden_size": int(options["width"]),
        "num_hidden_layers": int(options["layers"]),
        "num_attention_heads": int(options["heads"]),
        "num_key_value_heads": 1,
        "head_dim": int(options["head_width"]),
        "query_pre_attn_scalar": int(options["head_width"]),
        "intermediate_size": int(options["mlp_width"]),
        "max_position_embeddings": 512,
        "pad_token_id": 0,
        "eos_token_id": 1,
        "bos_token_id": 2,
    }


def make_model(request: Request, stop: StopFlag) -> bool:
    """Trains the demo's flow model and writes its weights, averaged if the run is, to `out/<arch>-demo/`."""
    from training.assemble import build_objective, prepare, save_weights, write_final, write_first_batch
    from training.scenes import captions_held_out

    reads_text = request.arch != "exo"  # whose trunk does
    path = CONFIGS / f"{request.arch}_demo.yaml"
    tables = yaml.safe_load(path.read_text(encoding="utf-8"))
    left_out = "scenes/two" if request.is_short else None
    datasets = [
        {**table, "path": str(request.out / table["path"])}
        for table in tables["datasets"]
        if table["path"] != left_out
    ]
    teachers = [_part(request.out, name) for name in tables["train"].get("teachers", ())]
    names = {"vae": VAE_NAME, **({"text": TEXT_NAME} if reads_text else {})}
    parts = [f"encoders.{part}={_part(request.out, name)}" for part, name in names.items()]
    places = [f"output.dir={request.out}", f"cache.dir={request.out / 'cache'}"]
    lists = [f"datasets={json.dumps(datasets)}", f"train.teachers={json.dumps(teachers)}"]
    assignments = [*places, *lists, *parts, *request.assignments]
    config = load_config(RunConfig, path, assignments)
    prompts = tuple(captions_held_out(48, 11, "one") + captions_held_out(16, 12, "two"))
    sampling = config.sampling.model_copy(update={"prompts": prompts})
    prepared = prepare(config.model_copy(update={"sampling": sampling}))

    def build(device: torch.device, stop: StopFlag) -> Objective:
        return build_objective(prepared, device, stop, judge_images)

    def finish(run: Run, folder: Path) -> None:
        write_final(run, folder)
        trained = run.config
        assert isinstance(trained, RunConfig)
        average = {**run.module.state_dict(), **(run.ema.average if run.ema else {})}
        facts = training_facts(run, folder) | {"flowcore.vae": VAE_NAME}
        if reads_text:
            facts["flowcore.text_encoder"] = TEXT_NAME
        target = request.out / f"{request.arch}-demo" / "model.safetensors"
        save_weights(average, target, trained, step=run.step, dtype="bfloat16", facts=facts)

    return start(prepared.config, request, build, finish, stop, begin=write_first_batch)


def training_facts(run: Run, folder: Path) -> dict[str, str]:
    """What the training cost: steps, seconds (from the logged ones), floating-point operations (counted).

    The run is at its end by then: its optimizer is lost.
    """
    from torch.utils.flop_counter import FlopCounterMode

    rows = read_metrics(folder / "metrics.csv")
    seconds = sum(row["seconds"] for row in rows) / len(rows) * run.step
    flops = 0.0
    for number, stage in enumerate(run.stages):
        run.enter(number)  # what takes no gradient has no backward pass
        with FlopCounterMode(display=False) as counter:
            run.objective.loss(stage.first, slice(0, stage.config.train.batch_size)).backward()
        flops += counter.get_total_flops() * (min(run.step, stage.last) - stage.first)
    return {
        "flowcore.train_steps": str(run.step),
        "flowcore.train_seconds": f"{seconds:.0f}",
        "flowcore.train_flops": f"{flops:.4g}",
    }


def judge_images(images: Tensor, captions: Sequence[str]) -> dict[str, float]:
    """Share of images that show what their captions say, by attribute and number of objects."""
    from training.scenes import accuracy, judge

    pixels = images.clamp(-1, 1).add(1).mul(127.5).round().byte().permute(0, 2, 3, 1).numpy()
    verdicts = [(judge(p, c), len(parse_caption(c).objects)) for p, c in zip(pixels, captions, strict=True)]
    values: dict[str, float] = {}
    for count, name in ((1, "one"), (2, "two")):
        shares = accuracy([verdict for verdict, objects in verdicts if objects == count])
        values |= {f"{name}/{attribute}": share for attribute, share in shares.items() if share is not None}
    return values


def _part(out: Path, name: str) -> str:
    """A part made in `out` if it is there, else the bundled one."""
    return str(out / name / "model.safetensors") if (out / name).exists() else name
