"""What exo learns: velocity and edits, masks alone, its projector, or to speak with its own trunk.

Samples with a source picture are edits: the picture goes through the vision tower, its latents are what the
edit is measured against. A batch holds edits or plain samples, in proportion to their numbers.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from flowcore.conditioning import Conditioning
from flowcore.errors import ConfigError
from flowcore.exo.masks import on_latents
from flowcore.models import Architecture
from flowcore.models.exo import Exo, PrefixState, StepResult
from flowcore.models.exo.grids import memory_grid, on_grid
from flowcore.models.exo.trunk import Picture, look
from flowcore.text.qwen3_vl import PromptReader, answer_ids, last_line
from training.data.buckets import Bucket
from training.data.encoded import EncodedSamples
from training.data.images import load_image
from training.encoders import ImageEncoder
from training.keys import generator
from training.objectives.exo_losses import PERCEPTUAL_BELOW, kept_and_changed, label_loss, likeness
from training.objectives.exo_stored import check_prompt, stored_prompts
from training.objectives.flow_matching import Draw, FlowMatchingObjective, Judge, Recipe
from training.objectives.language import PLACE_SHARE, CaptionWords, TokenHeads, next_loss, place_loss


class ExoObjective(FlowMatchingObjective):
    """The losses of exo.md 10.2 over encoded samples and their source pictures.

    The number of iterations depends on (seed, step) alone, all else on the sample's place in the batch, too.
    """

    def __init__(
        self,
        module: Exo,
        architecture: Architecture,
        data: EncodedSamples,
        image_encoder: ImageEncoder,
        chat: PromptReader,
        recipes: Sequence[Recipe],
        *,
        device: torch.device,
        judge: Judge | None = None,
    ) -> None:
        """As `FlowMatchingObjective`.

        Raises: ConfigError if a perceptual loss needs a package, or masks no edits to learn from; DataError
            for encoded samples of others.
        """
        super().__init__(module, architecture, data, image_encoder, chat, recipes, device=device, judge=judge)
        self.exo, self.chat = module, chat
        for number, sample in enumerate(data.samples):
            if sample.is_told:
                check_prompt(sample.path, data.told(number), is_edit=sample.is_edit)
        self.likeness = {
            recipe.exo.features: likeness(recipe.exo.features, image_encoder) for recipe in recipes
        }
        tasks = {recipe.exo.task for recipe in recipes}
        self._check_edits(recipes)
        self.heads: TokenHeads | None = None
        if "language" in tasks:
            vocab = module.config.trunk["text_config"]["vocab_size"]
            self.heads = TokenHeads(vocab, module.config.hidden_size, self.recipe.seed, device)
        self.words: CaptionWords | None = None
        if any(recipe.exo.words for recipe in recipes if recipe.exo.task == "projector"):
            vocab = module.config.trunk["text_config"]["vocab_size"]
            said = [self._words_of(number) for number in range(len(data.samples))]
            self.words = CaptionWords(said, vocab, device)

    def kind_of(self, number: int) -> tuple[Bucket, int]:
        """Size, whether the sample is an edit, and whether its file tells the model so."""
        sample = self.data.samples[number]
        return self.data.buckets[number], sample.is_edit + 2 * sample.is_told

    def loss(self, step: int, part: slice) -> Tensor:
        """Loss of samples `part` of a step's batch, float32."""
        draw = self.draw(step, part)
        task = self.recipe_at(step).exo.task
        losses = {
            "velocity": self._velocity_loss,
            "masks": self._masks_loss,
            "projector": self._projector_loss,
            "language": self._language_loss,
            "rewrite": self._rewrite_loss,
        }
        return losses[task](draw)

    def groups_at(self, step: int) -> list[list[int]]:
        """As for any model; only edits where masks or rewriting are learned, none if the recipe says so."""
        wanted = _wanted(self.recipe_at(step))
        return [group for group in self.groups if self.data.samples[group[0]].is_edit in wanted]

    def iterations(self, step: int) -> int:
        """Iterations of a step of training."""
        recipe = self.recipe_at(step)
        least, most = recipe.exo.iterations
        return int(torch.randint(least, most + 1, (1,), generator=generator(recipe.seed, "iterations", step)))

    def conditioning(self, draw: Draw) -> Conditioning:
        """Token ids of the captions, with the patches of the source pictures of edits."""
        return self.text_of(draw.numbers, draw.dropped.tolist()).to(self.device)

    def text_of(self, numbers: Sequence[int], dropped: Sequence[bool]) -> Conditioning:
        """The same, without the captions that are dropped; as a sample's file has them if it does."""
        if self.data.samples[numbers[0]].is_told:
            return stored_prompts([self.data.told(number) for number in numbers], dropped, self.chat)
        captions = ["" if drop else self._shown(n) for n, drop in zip(numbers, dropped, strict=True)]
        return self.chat.read(captions, self._sources(numbers))

    def told(self, draw: Draw) -> Conditioning:
        """Token ids of any captions, with the patches of the source pictures of edits."""
        return self.chat.read(draw.captions, self._sources(draw.numbers)).to(self.device)

    def predict(self, draw: Draw, conditioning: Conditioning) -> Tensor:
        """The velocity `b c h w` of noised samples."""
        return self._step(draw, self._prefix(draw, conditioning), self.iterations(draw.step)).velocity

    def target(self, draw: Draw) -> Tensor:
        """As for any model; of edits, which teachers do not see, the data's."""
        return draw.sample.velocity if self._is_edit(draw) else super().target(draw)

    def sampling_options(self, conditioning: Conditioning, noise: Tensor) -> dict[str, Any]:
        """The prompts, read once for all steps."""
        ids, mask = conditioning.context, conditioning.context_mask
        assert ids is not None
        return {"prefix": self.exo.encode(ids[..., 0], mask, size=(noise.shape[-2], noise.shape[-1]))}

    def _prefix(self, draw: Draw, conditioning: Conditioning) -> PrefixState:
        ids, z = conditioning.context, draw.sample.noised
        assert ids is not None
        return self.exo.encode(
            ids[..., 0],
            conditioning.context_mask,
            **conditioning.extras,
            size=(z.shape[-2], z.shape[-1]),
            dtype=z.dtype,
            runtime=self.recipe_at(draw.step).runtime(),
        )

    def _step(self, draw: Draw, prefix: PrefixState, iterations: int) -> StepResult:
        return self.exo.step(
            draw.sample.noised,
            draw.sigma,
            prefix,
            iterations=iterations,
            through=self._runs_through(draw),
            runtime=self.recipe_at(draw.step).runtime(),
        )

    def _velocity_loss(self, draw: Draw) -> Tensor:
        """Weighted sum of the three losses; those of weight 0 are not computed."""
        weights = self.recipe_at(draw.step).exo
        prefix = self._prefix(draw, self.conditioning(draw))
        result = self._step(draw, prefix, self.iterations(draw.step))
        loss = weights.diffusion * functional.mse_loss(result.velocity.float(), self.target(draw))
        if weights.edit:
            loss = loss + weights.edit * self._edit_loss(draw, prefix, result)
        if weights.rewrite and self._is_edit(draw):
            loss = loss + weights.rewrite * self._words_loss(draw)[0]
        if weights.perceptual:
            loss = loss + weights.perceptual * self._perceptual_loss(draw, result)
        if weights.source and prefix.features is not None:
            estimate = self.exo.projector.latents(prefix.features).float()
            loss = loss + weights.source * functional.mse_loss(estimate, self._source_latents(draw))
        return loss

    def _masks_loss(self, draw: Draw) -> Tensor:
        """Mean cross-entropy of the masks of all iterations against the labels of edits."""
        recipe, source = self.recipe_at(draw.step), self._source_latents(draw)
        found = self.exo.refine(
            self._partly_source(draw, source),
            draw.sigma,
            self._prefix(draw, self.conditioning(draw)),
            iterations=self.iterations(draw.step),
            through=self._runs_through(draw),
            runtime=recipe.runtime(),
        )
        size = source.shape[-2:]
        losses = [
            label_loss(on_grid(one.edit.mask, size), source, draw.clean, recipe.exo.sparsity) for one in found
        ]
        return torch.stack(losses).mean()

    def _partly_source(self, draw: Draw, source: Tensor) -> Tensor:
        """The noised latents, but for a quarter of the samples those of the source in a share of the cells.

        So masks do not only find what differs: sampling that preserves the source shows it in every cell that
        no mask has marked yet. The more samples have such cells, the more a cell without a difference is
        marked in vain.
        """
        size, seed = (source.shape[-2], source.shape[-1]), self.recipe.seed
        kept = []
        for position in range(draw.first, draw.first + len(draw.numbers)):
            chance = generator(seed, "kept", draw.step, position)
            part = 4 * torch.rand(1, generator=chance) - 3
            kept.append(torch.rand(memory_grid(*size), generator=chance) < part)
        still = on_latents(torch.stack(kept), size).to(source)
        share = (1 - draw.sigma).reshape(-1, 1, 1, 1)
        return draw.sample.noised + still * share * (source - draw.clean)

    def _edit_loss(self, draw: Draw, prefix: PrefixState, result: StepResult) -> Tensor:
        """R, the price of the mask, and for edits the cross-entropy against their labels."""
        weights = self.recipe_at(draw.step).exo
        mask = result.mask.float()
        loss = weights.sparsity * mask.mean()
        estimate = result.clean.float()
        if self._is_edit(draw):
            source = self._source_latents(draw)
            labelled = label_loss(mask, source, draw.clean, weights.sparsity)
            loss = loss + weights.labels * labelled + kept_and_changed(mask, estimate, source, draw.clean)
        elif weights.plain_edits and len(result.iterations) > 1:
            with torch.no_grad():
                first = self._step(draw, prefix, 1).clean.float()
            loss = loss + kept_and_changed(mask, estimate, first, draw.clean)
        return loss

    def _perceptual_loss(self, draw: Draw, result: StepResult) -> Tensor:
        """Mean distance of the estimates from the clean latents, 0 for those of much noise."""
        recipe = self.recipe_at(draw.step)
        distance = self.likeness[recipe.exo.features]
        counted = (draw.sigma < PERCEPTUAL_BELOW).nonzero()[:, 0]
        if distance is None or not len(counted):
            return draw.sigma.new_zeros(())
        found, wanted = result.clean.float()[counted], draw.clean[counted]
        chance = generator(recipe.seed, "crop", draw.step)
        return distance(found, wanted, chance).sum() / len(draw.sigma)

    def _projector_loss(self, draw: Draw) -> Tensor:
        """Squared error of the latents that the projector makes of the samples' own pictures, with words."""
        told = self.chat.read([""] * len(draw.numbers), self._pictures(draw.numbers)).to(self.device)
        trunk = self.exo.trunk
        assert trunk is not None
        picture = look(trunk, told.extras["pixels"], told.extras["grids"])
        weights = self.recipe_at(draw.step).exo
        loss = weights.diffusion * self._seen_loss(picture, draw.clean)
        if weights.words:
            assert self.words is not None
            table = self.exo.get_parameter("trunk.language_model.embed_tokens.weight")
            tokens = trunk.get_submodule("language_model.norm")(picture.tokens)
            said = [self._words_of(number) for number in draw.numbers]
            places = place_loss(tokens, (picture.rows, picture.columns), self.recipe.seed)
            loss = loss + weights.words * (self.words.loss(tokens, table, said) + PLACE_SHARE * places)
        return loss

    def _seen_loss(self, picture: Picture, latents: Tensor) -> Tensor:
        """Squared error of the latents that the projector makes of what is seen."""
        grid, size = (picture.rows, picture.columns), (latents.shape[-2], latents.shape[-1])
        features = self.exo.projector(picture.tokens.to(latents.dtype), grid, size)
        return functional.mse_loss(self.exo.projector.latents(features).float(), latents)

    def _language_loss(self, draw: Draw) -> Tensor:
        """Words of captions and answers from the states that the diffusion head reads; no picture is seen."""
        told = self.chat.read(draw.captions, answers=self._answers(draw)).to(self.device)
        assert told.context is not None
        assert told.context_mask is not None
        assert self.heads is not None
        ids, mask = told.context[..., 0], told.context_mask
        passed = self.exo.read(ids, mask, runtime=self.recipe_at(draw.step).runtime()).passed
        table = self.exo.get_parameter("trunk.language_model.embed_tokens.weight")
        # a third of the tokens, in turns: reading words costs as much as the trunk
        turn = torch.arange(ids.shape[1], device=self.device) % 3 == draw.step % 3
        spoken = torch.stack([self.heads.spoken_loss(state, ids, mask & turn) for state in passed.taps])
        return next_loss(passed.hidden, table, ids, mask) + spoken.mean()

    def _rewrite_loss(self, draw: Draw) -> Tensor:
        """Cross-entropy of the words for what edits show, and the error of the latents of what is seen."""
        loss, picture = self._words_loss(draw)
        weight = self.recipe_at(draw.step).exo.source
        if weight:
            assert picture is not None
            loss = loss + weight * self._seen_loss(picture, self._source_latents(draw))
        return loss

    def _words_loss(self, draw: Draw) -> tuple[Tensor, Picture | None]:
        """Cross-entropy of the words for what edits show, after source and request, and what is seen."""
        answers = self._answers(draw)
        assert answers is not None
        asked = [self.data.samples[number].caption for number in draw.numbers]
        told = self.chat.read(asked, self._sources(draw.numbers), answers=answers).to(self.device)
        assert told.context is not None
        assert told.context_mask is not None
        ids, mask = told.context[..., 0], told.context_mask
        reading = self.exo.read(ids, mask, **told.extras, runtime=self.recipe_at(draw.step).runtime())
        lengths = [len(answer_ids(self.chat.tokenizer, answer)) for answer in answers]
        first = mask.sum(dim=1) - torch.tensor(lengths, device=self.device)
        is_said = mask & (torch.arange(ids.shape[1], device=self.device) >= first[:, None])
        table = self.exo.get_parameter("trunk.language_model.embed_tokens.weight")
        return next_loss(reading.passed.hidden, table, ids, is_said), reading.picture

    def _answers(self, draw: Draw) -> list[str] | None:
        """What the model is to say, None of samples of which it says nothing."""
        samples = [self.data.samples[number] for number in draw.numbers]
        answers = [sample.answer for sample in samples if sample.answer is not None]
        return answers if self.exo.config.rewrites and len(answers) == len(samples) else None

    def _shown(self, number: int) -> str:
        """What a sample's image shows: its caption, or what the answer comes to if the model gives one."""
        sample = self.data.samples[number]
        if sample.answer is None or not self.exo.config.rewrites:
            return sample.caption
        return last_line(sample.answer)

    def _words_of(self, number: int) -> list[int]:
        """Token ids of what is said of a sample's image; none of an edit's that is not described."""
        sample = self.data.samples[number]
        told = last_line(sample.answer or "") if sample.is_edit else sample.caption
        return self.chat.tokenizer.ids(told)

    def _check_edits(self, recipes: Sequence[Recipe]) -> None:
        """Raises: ConfigError if masks are learned without edits, or words for edits that have none."""
        edits = [sample for sample in self.data.samples if sample.is_edit]
        for recipe in recipes:
            task, wanted = recipe.exo.task, _wanted(recipe)
            if False not in wanted and not edits:
                raise ConfigError(f"train.exo.task {task} must have a dataset with source pictures, got none")
            if True not in wanted and len(edits) == len(self.data.samples):
                raise ConfigError("train.exo.edits must be true for datasets of edits alone, got false")
            if task != "rewrite" and not recipe.exo.rewrite:
                continue
            if not self.exo.config.rewrites:
                raise ConfigError("train.exo must not learn to rewrite, got a model with rewrites: false")
            untold = next((sample.path for sample in edits if sample.answer is None), None)
            if untold is not None:
                raise ConfigError(
                    f"train.exo must not learn to rewrite from {untold}, which is not described; add its "
                    f'description as "target" to {untold.with_suffix(".json").name}'
                )

    def _source_latents(self, draw: Draw) -> Tensor:
        return self.data.source_latents(draw.numbers).to(self.device)

    def _runs_through(self, draw: Draw) -> bool:
        return self.recipe_at(draw.step).exo.gradient == "all"

    def _is_edit(self, draw: Draw) -> bool:
        return self.data.samples[draw.numbers[0]].is_edit

    def _sources(self, numbers: Sequence[int]) -> Tensor | None:
        """The source pictures `b 3 y x` of edits, None for plain samples."""
        if not self.data.samples[numbers[0]].is_edit:
            return None
        return torch.stack([self._picture(number, is_source=True) for number in numbers])

    def _pictures(self, numbers: Sequence[int]) -> Tensor:
        """The pictures `b 3 y x` of samples themselves."""
        return torch.stack([self._picture(number, is_source=False) for number in numbers])

    def _picture(self, number: int, *, is_source: bool) -> Tensor:
        """A sample's picture `3 y x`, or that before its edit; of stored latents, what they decode to."""
        sample = self.data.samples[number]
        path = sample.source if is_source else sample.path
        if path is not None and not sample.stored:
            return load_image(path, self.data.buckets[number])
        latents = self.data.source_latents([number]) if is_source else self.data.latents([number])
        return self.image_encoder.decode(latents.to(self.device))[0].clamp(-1, 1).cpu()


def _wanted(recipe: Recipe) -> tuple[bool, ...]:
    """Whether a step draws from edits (True), from samples that are none (False), or from both."""
    if recipe.exo.task in ("masks", "rewrite"):
        return (True,)
    return (False, True) if recipe.exo.edits or recipe.exo.task != "velocity" else (False,)
