"""Quantile function of the beta distribution in float64, which torch lacks."""

import math

import torch
from torch import Tensor

MAX_PARAMETER = 100.0
"""Largest parameter for which the series below keeps its accuracy; training laws use a few units."""

_MAX_TERMS = 2000
_MAX_ITERATIONS = 80


def beta_log_density(x: Tensor, alpha: float, beta: float) -> Tensor:
    """Logarithm of the density of Beta(alpha, beta) at x in (0, 1). Shapes: any; result like x."""
    return (alpha - 1) * torch.log(x) + (beta - 1) * torch.log1p(-x) - _log_norm(alpha, beta)


def beta_cdf(x: Tensor, alpha: float, beta: float) -> Tensor:
    """Distribution function of Beta(alpha, beta): the incomplete beta function.

    Shapes: any, float64.
    Source: Abramowitz and Stegun, 26.5.4 (as a series of positive terms) and 26.5.2 for x above one half.
    """
    lower = _tail(x.clamp(max=0.5), alpha, beta)
    upper = _tail((1 - x).clamp(max=0.5), beta, alpha)
    return torch.where(x <= 0.5, lower, 1 - upper)


def beta_quantile(u: Tensor, alpha: float, beta: float) -> Tensor:
    """The x with distribution function u: Newton steps kept inside a shrinking bracket.

    Shapes: any, u in [0, 1].
    Computed in float64 whatever the dtype of u; absolute error below 1e-12.
    """
    u = u.to(torch.float64)
    low, high = torch.zeros_like(u), torch.ones_like(u)
    x = torch.full_like(u, alpha / (alpha + beta))
    for _ in range(_MAX_ITERATIONS):
        excess = beta_cdf(x, alpha, beta) - u
        low, high = torch.where(excess < 0, x, low), torch.where(excess > 0, x, high)
        step = excess * torch.exp(-beta_log_density(x, alpha, beta))
        newton = x - step
        inside = (newton >= low) & (newton <= high)
        new = torch.where(excess == 0, x, torch.where(inside, newton, (low + high) / 2))
        done = bool(((new - x).abs() <= 1e-12 * new + 1e-18).all())
        x = new
        if done:
            break
    return torch.where(u <= 0, 0.0, torch.where(u >= 1, 1.0, x))


def _log_norm(alpha: float, beta: float) -> float:
    return math.lgamma(alpha) + math.lgamma(beta) - math.lgamma(alpha + beta)


def _tail(x: Tensor, alpha: float, beta: float) -> Tensor:
    """Incomplete beta function for x <= 1/2: x^alpha (1-x)^beta / (alpha B) times a hypergeometric series."""
    coefficients = torch.tensor(_coefficients(alpha, beta), dtype=x.dtype, device=x.device)
    powers = torch.arange(coefficients.shape[0], dtype=x.dtype, device=x.device)
    series = (x.unsqueeze(-1).pow(powers) * coefficients).sum(-1)
    log_front = alpha * torch.log(x) + beta * torch.log1p(-x) - math.log(alpha) - _log_norm(alpha, beta)
    return torch.exp(log_front) * series


def _coefficients(alpha: float, beta: float) -> list[float]:
    """Coefficients of 2F1(alpha + beta, 1; alpha + 1; x), as many as matter at x = 1/2."""
    coefficients, term, total = [1.0], 1.0, 1.0
    for k in range(_MAX_TERMS):
        coefficients.append(coefficients[-1] * (alpha + beta + k) / (alpha + 1 + k))
        term *= 0.5 * (alpha + beta + k) / (alpha + 1 + k)
        total += term
        if term < 1e-18 * total:
            break
    return coefficients
