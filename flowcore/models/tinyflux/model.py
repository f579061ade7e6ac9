"""TinyFlux, a small two-stream transformer with two built-in predictors of teacher features.

    latents -------------------------------------+
    text tokens ---------------------------------+-> [ double blocks ] -> [ single blocks ] -> velocity
    time, pooled text -+-> condition of all blocks        ^                    ^
                       +-> Lune: added to the condition   |                    |
                       +-> Sol: temperature and importance in every attention -+

Time runs from 0 = noise to 1 = data, and the output is data - noise. Source: AbstractEyes/tiny-flux, 4.2.
"""

from collections.abc import Iterable
from functools import partial
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.nn import functional

from ...layers.norm import RMSNorm, at_use
from ...layers.patch import cells_to_tokens, tokens_to_cells
from ...layers.pooling import masked_mean
from ...layers.precision import no_autocast
from ...layers.rope import Rotation
from ...ops import DEFAULT_RUNTIME, TORCH_OPS, Ops, Runtime
from .blocks import (
    DoubleBlock,
    RotaryTables,
    Signals,
    SingleBlock,
    TimestepEmbedding,
    grid_positions,
)
from .config import TinyFluxConfig
from .experts import (
    LuneOutput,
    LunePredictor,
    SolOutput,
    SolPrior,
    importance_grid,
    inverse_temperature,
)
from .inputs import (
    FULL_USE,
    ExpertUse,
    TeacherValues,
    Text,
    check_inputs,
    check_positions,
    check_size,
    check_teachers,
)

TEXT_LENGTH = 128
"""Text tokens that the published models were trained with."""

Info: TypeAlias = dict[str, dict[str, Any] | None]
"""What the predictors said, by the original's names; None where one is absent or off."""


class TinyFlux(nn.Module):
    """Predicts the velocity data - noise of latent cells; time runs from 0 = noise to 1 = data.

    Arguments of the call:
        hidden_states: latent cells `b n c`, row by row, of which patch_size x patch_size make a token. Their
            dtype is that of the blocks.
        encoder_hidden_states: text `b m k`. Published models count padding as text: no context_mask.
        pooled_projections: `b k`; None only in a model with `pooled_from_text`.
        timestep: `b` in [0, 1], float32 whatever the dtype of hidden_states.
        img_ids: positions (0, row, column) of the image's tokens `k 3`, or `b k 3` of which the first counts;
            None = a grid.
        txt_ids: positions of the text, likewise; None = all zero. Only single blocks turn text.
        guidance: `b`, for models of old that embed it.
        lune_features: the teacher's `b k` in the place of Lune's prediction; training only.
        sol_stats: the teacher's `b 3` in the place of Sol's prediction, likewise.
        sol_spatial: the teacher's map `b s s`, likewise.
        return_expert_pred: return the velocity and what the predictors said.
        size: (rows, columns) of the cells; None = a square, as in the original.
        context_mask: `b m` boolean, True = real token; None attends to every row.
        use: which predictors act, and which samples have a teacher's values.
        generator: source of Lune's dropout in training.
        runtime: replacements of the attention product and of blocks.
    """

    def __init__(
        self,
        config: TinyFluxConfig,
        *,
        ops: Ops = TORCH_OPS,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        """Build the layers: Xavier-uniform, no biases, and a zero output. Modulations start at random."""
        super().__init__()
        self.config = config
        where: dict[str, Any] = {"device": device, "dtype": dtype}
        dim = config.hidden_size
        self.img_in = ops.float_linear(config.token_dim, dim, device=device)
        self.txt_in = ops.float_linear(config.joint_attention_dim, dim, device=device)
        self.time_in = TimestepEmbedding(dim, ops=ops, device=device)
        self.vector_in = nn.Sequential(
            nn.SiLU(), ops.float_linear(config.pooled_projection_dim, dim, device=device)
        )
        self.t5_pool = self.text_balance = None
        if config.use_t5_vec:
            self.t5_pool = nn.Sequential(
                ops.float_linear(config.joint_attention_dim, dim, device=device),
                nn.SiLU(),
                ops.float_linear(dim, dim, device=device),
            )
            self.text_balance = nn.Parameter(torch.zeros((), device=device))
        self.guidance_in = TimestepEmbedding(dim, ops=ops, device=device) if config.guidance_embeds else None
        self.lune_predictor = (
            LunePredictor(config, ops=ops, device=device) if config.use_lune_expert else None
        )
        self.sol_prior = SolPrior(config, ops=ops, device=device) if config.use_sol_prior else None
        self.rope = RotaryTables(config.axes_dims_rope, device)
        self.double_blocks = nn.ModuleList(
            DoubleBlock(config, ops=ops, **where) for _ in range(config.num_double_layers)
        )
        self.single_blocks = nn.ModuleList(
            SingleBlock(config, ops=ops, **where) for _ in range(config.num_single_layers)
        )
        self.final_norm = RMSNorm(dim, device)
        self.final_linear = ops.float_linear(dim, config.token_dim, device=device)
        self._initialise()

    def _initialise(self) -> None:
        """Give every layer the published initial values, and freeze what the configuration freezes."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        nn.init.zeros_(self.final_linear.weight)
        if self.lune_predictor is not None:
            self.lune_predictor.requires_grad_(not self.config.freeze_lune)
        if self.sol_prior is not None:
            self.sol_prior.requires_grad_(not self.config.freeze_sol)

    def forward(  # noqa: PLR0913 - the original's arguments and ours
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        pooled_projections: Tensor | None,
        timestep: Tensor,
        img_ids: Tensor | None = None,
        txt_ids: Tensor | None = None,
        *,
        guidance: Tensor | None = None,
        lune_features: Tensor | None = None,
        sol_stats: Tensor | None = None,
        sol_spatial: Tensor | None = None,
        return_expert_pred: bool = False,
        size: tuple[int, int] | None = None,
        context_mask: Tensor | None = None,
        use: ExpertUse = FULL_USE,
        generator: torch.Generator | None = None,
        runtime: Runtime = DEFAULT_RUNTIME,
    ) -> Tensor | tuple[Tensor, Info]:
        """Return the velocity data - noise `b n c` of noised cells, in the dtype of hidden_states.

        Arguments are described with the class.
        Raises: ShapeError if an input has the wrong shape or the model has no part for it.
        """
        cells = check_size(size, hidden_states.shape[1])
        text = Text(encoder_hidden_states, pooled_projections, context_mask)
        taught = TeacherValues(lune_features, sol_stats, sol_spatial)
        check_inputs(self.config, hidden_states, text, timestep, guidance)
        check_teachers(self.config, hidden_states.shape[0], taught, use)
        times = timestep.float().reshape(-1)
        with no_autocast(hidden_states.device):
            vector, lune, sol = self._steering(text, times, guidance, taught, use, generator)
        num_text = encoder_hidden_states.shape[1]
        image, grid = cells_to_tokens(hidden_states, cells, self.config.patch_size)
        double_turn, single_turn = self._turns(grid, num_text, img_ids, txt_ids, hidden_states.device)
        signals = Signals(
            num_text=num_text,
            dtype=hidden_states.dtype,
            condition=functional.silu(vector)[:, None],
            double_turn=double_turn,
            single_turn=single_turn,
            bias=None if context_mask is None else _key_mask(context_mask, image.shape[1]),
            importance=None if sol is None else importance_grid(sol, *grid),
            inverse_temperature=None if sol is None else inverse_temperature(sol),
        )
        x = torch.cat((self.txt_in(text.tokens), self.img_in(image)), dim=1).float()  # b (m + n) d
        x = _run_blocks("double", self.double_blocks, x, signals, runtime)
        x = _run_blocks("single", self.single_blocks, x, signals, runtime)
        velocity = self.final_linear(self.final_norm(x[:, num_text:])).to(hidden_states.dtype)  # b k (p q c)
        velocity = tokens_to_cells(velocity, grid, cells, self.config.patch_size)  # b n c
        return (velocity, _info(lune, sol)) if return_expert_pred else velocity

    def _steering(
        self,
        text: Text,
        times: Tensor,
        guidance: Tensor | None,
        taught: TeacherValues,
        use: ExpertUse,
        generator: torch.Generator | None,
    ) -> tuple[Tensor, LuneOutput | None, SolOutput | None]:
        """Return the condition of all blocks `b d`, float32, and what the predictors say."""
        time = self.time_in(times)
        pooled = masked_mean(text.tokens, text.mask) if text.pooled is None else text.pooled.float()
        vector = time + self._text_vector(text, pooled)
        z = torch.cat((time, pooled), dim=-1)
        lune, sol = None, None
        if self.lune_predictor is not None and use.lune:
            lune = self.lune_predictor(z, taught.lune_features, use.lune_present, generator)
            vector = vector + lune.signal
        if self.sol_prior is not None and use.sol:
            sol = self.sol_prior(z, times, taught.sol_stats, taught.sol_spatial, use.sol_present)
        if self.guidance_in is not None and guidance is not None:
            vector = vector + self.guidance_in(guidance)
        return vector, lune, sol

    def _text_vector(self, text: Text, pooled: Tensor) -> Tensor:
        """Return the pooled vector and the tokens, weighted by their own means, as one vector `b d`."""
        clip: Tensor = self.vector_in(pooled)
        if self.t5_pool is None or self.text_balance is None:
            return clip
        scores = text.tokens.float().mean(dim=-1)  # b m
        if text.mask is not None:
            scores = scores.masked_fill(~text.mask, -torch.inf)
        t5 = self.t5_pool(torch.einsum("bm,bmk->bk", scores.softmax(dim=-1), text.tokens.float()))
        return torch.lerp(t5, clip, at_use(self.text_balance, clip).sigmoid())

    def _turns(
        self,
        grid: tuple[int, int],
        num_text: int,
        img_ids: Tensor | None,
        txt_ids: Tensor | None,
        device: torch.device,
    ) -> tuple[Rotation, Rotation]:
        """Return the rotations of double and single blocks, `(m + n) (e/2)`: the former leave text alone."""
        image = grid_positions(*grid, device=device)
        if img_ids is not None:
            image = check_positions("img_ids", img_ids, image.shape[0]).float()
        double: Rotation = self.rope(functional.pad(image, (0, 0, num_text, 0)))
        if txt_ids is None:
            return double, double
        text = check_positions("txt_ids", txt_ids, num_text).float()
        return double, self.rope(torch.cat((text, image)))


def _run_blocks(
    kind: str, blocks: Iterable[nn.Module], x: Tensor, signals: Signals, runtime: Runtime
) -> Tensor:
    """Return x after the blocks, each called through the runtime under its kind and number."""
    for index, block in enumerate(blocks):
        call = partial(block, signals=signals, attention=runtime.attention)
        x = runtime.run_block(kind, index, call, x)
    return x


def _key_mask(mask: Tensor, num_image: int) -> Tensor:
    """Return which keys count, `b 1 1 (m + n)`: real text and all of the image."""
    return functional.pad(mask, (0, num_image), value=True)[:, None, None]


def _info(lune: LuneOutput | None, sol: SolOutput | None) -> Info:
    """Return the predictors' outputs in the original's form."""
    info: Info = {"lune": None, "sol": None}
    if lune is not None:
        info["lune"] = {
            "expert_signal": lune.signal,
            "expert_pred": lune.predicted,
            "expert_used": "real" if lune.has_teacher else "predicted",
        }
    if sol is not None:
        info["sol"] = {
            "temperature": sol.temperature,
            "spatial_importance": sol.importance,
            "pred_stats": sol.predicted_stats,
            "pred_spatial": sol.predicted_spatial,
        }
    return info
