"""The border check of XUT's inputs: once a call, nothing inside the blocks."""

from torch import Tensor

from ...errors import ShapeError
from .config import XUTConfig


def check_inputs(
    config: XUTConfig,
    x: Tensor,
    t: Tensor,
    ctx: Tensor | None,
    *,
    ctx_mask: Tensor | None,
    pos_map: Tensor | None,
    r: Tensor | None,
    addon_info: Tensor | None,
) -> None:
    """Check padded latents and every condition against the configuration.

    Raises: ShapeError that names the input, the shape it must have, and the one it has.
    """
    if x.ndim != 4 or x.shape[1] != config.input_dim:
        raise ShapeError(f"latents must be b {config.input_dim} h w, got {tuple(x.shape)}")
    batch = x.shape[0]
    if t.numel() != batch:
        raise ShapeError(f"times must be one for each of {batch} samples, got {tuple(t.shape)}")
    if config.class_cond:
        _check_class_ids(ctx, ctx_mask, batch)
    else:
        _check_context(config, ctx, ctx_mask, batch)
    if pos_map is not None:
        _check_positions(pos_map, x)
    if r is not None:
        _require(config.double_t, "r", "double_t")
        _check_shape("r", r, (batch,))
    if addon_info is not None:
        _require(config.addon_info_embs_dim is not None, "addon_info", "addon_info_embs_dim")
        expected = (batch,) if addon_info.ndim == 1 else (batch, config.addon_info_embs_dim)
        _check_shape("addon_info", addon_info, expected)


def _require(has_layer: bool, name: str, field: str) -> None:
    if not has_layer:
        raise ShapeError(f"{name} must be absent, for the model has no layer for it ({field} is not set)")


def _check_shape(name: str, tensor: Tensor, expected: tuple[int | None, ...]) -> None:
    if tuple(tensor.shape) != expected:
        raise ShapeError(f"{name} must have shape {expected}, got {tuple(tensor.shape)}")


def _check_class_ids(ids: Tensor | None, mask: Tensor | None, batch: int) -> None:
    if mask is not None:
        raise ShapeError("ctx_mask must be absent, for the model reads class ids, got a mask")
    if ids is not None and (ids.is_floating_point() or ids.numel() != batch):
        raise ShapeError(f"class ids must be {batch} integers, got {tuple(ids.shape)} of {ids.dtype}")


def _check_context(config: XUTConfig, ctx: Tensor | None, mask: Tensor | None, batch: int) -> None:
    if ctx is not None:
        _require(config.ctx_dim is not None, "ctx", "ctx_dim")
        if ctx.ndim != 3 or ctx.shape[0] != batch or ctx.shape[2] != config.ctx_dim:
            raise ShapeError(f"ctx must be {batch} m {config.ctx_dim}, got {tuple(ctx.shape)}")
    if mask is not None:
        if ctx is None:
            raise ShapeError("ctx_mask must come with ctx, got ctx None")
        if mask.dtype.is_floating_point or tuple(mask.shape) != tuple(ctx.shape[:2]):
            raise ShapeError(
                f"ctx_mask must be boolean {tuple(ctx.shape[:2])}, got {tuple(mask.shape)} {mask.dtype}"
            )


def _check_positions(pos_map: Tensor, x: Tensor) -> None:
    cells = x.shape[2] * x.shape[3]
    if pos_map.ndim != 3 or pos_map.shape[0] not in (1, x.shape[0]) or tuple(pos_map.shape[1:]) != (cells, 2):
        raise ShapeError(
            f"pos_map must be {x.shape[0]} {cells} 2, a position for each latent of the padded "
            f"{x.shape[2]} x {x.shape[3]} grid, got {tuple(pos_map.shape)}"
        )
