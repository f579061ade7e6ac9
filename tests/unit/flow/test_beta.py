import math

import pytest
import torch
from torch.testing import assert_close

from flowcore.flow.beta import beta_cdf, beta_log_density, beta_quantile

PARAMETERS = [(2.5, 2.0), (1.0, 1.0), (0.5, 0.5), (0.4, 3.0), (20.0, 0.7), (60.0, 100.0)]
U = torch.linspace(0.001, 0.999, 57, dtype=torch.float64)


@pytest.mark.parametrize(("alpha", "beta"), PARAMETERS)
def test_quantile_inverts_the_distribution_function(alpha: float, beta: float) -> None:
    x = beta_quantile(U, alpha, beta)
    assert ((x > 0) & (x < 1)).all()
    assert_close(beta_cdf(x, alpha, beta), U, atol=1e-12, rtol=0)


def test_closed_forms() -> None:
    x = torch.linspace(0.01, 0.99, 33, dtype=torch.float64)
    assert_close(beta_cdf(x, 1.0, 1.0), x)
    assert_close(beta_cdf(x, 3.0, 1.0), x**3)
    assert_close(beta_cdf(x, 1.0, 4.0), 1 - (1 - x) ** 4)
    assert_close(beta_cdf(x, 0.5, 0.5), 2 / math.pi * torch.asin(x.sqrt()))
    assert_close(beta_cdf(x, 2.0, 2.0), 3 * x**2 - 2 * x**3)


@pytest.mark.parametrize(("alpha", "beta"), PARAMETERS)
def test_density_is_the_slope_of_the_distribution_function(alpha: float, beta: float) -> None:
    x = torch.linspace(0.05, 0.95, 19, dtype=torch.float64)
    step = 1e-5
    slope = (beta_cdf(x + step, alpha, beta) - beta_cdf(x - step, alpha, beta)) / (2 * step)
    assert_close(torch.exp(beta_log_density(x, alpha, beta)), slope, atol=1e-6, rtol=1e-6)


def test_ends() -> None:
    ends = torch.tensor([0.0, 1.0], dtype=torch.float64)
    assert beta_quantile(ends, 2.5, 2.0).tolist() == [0.0, 1.0]
