"""Golden cases of `arch` = `flow`: conversions, schedules and laws, guidance, solvers, all in float64.

Names of outputs carry the parameters (`beta(2.5,2)_ppf_of_u`, `ddim_eta0.5`), so they are read from the name.
"""

import json
import re
from collections.abc import Callable, Iterator, Mapping
from functools import partial

import torch
from torch import Tensor

from flowcore.flow import guidance, loss_weights, noise_levels, path, runge_kutta, schedule, solvers
from flowcore.flow import variance_preserving as vp
from tests.golden.compare import Case, Metadata, Options, Tensors

Compute = Callable[..., Tensor]

NUMBER = r"(-?[0-9.]+)"


def cases(tensors: Tensors, metadata: Metadata, options: Options) -> Iterator[Case]:
    """Every output of one file, in float64; only the device is the caller's choice."""
    tensors = {key: value.to(options.device) for key, value in tensors.items()}
    inputs = {key.removeprefix("input."): value for key, value in tensors.items() if key.startswith("input.")}
    config = json.loads(metadata["config"])
    find = KINDS[metadata["kind"]](inputs, config)
    for key in sorted(tensors):
        if key.startswith("output."):
            yield Case(key, find(key.removeprefix("output.")), tensors[key])


def conversions(inputs: Tensors, _config: Mapping[str, object]) -> Callable[[str], Tensor]:
    """Section 1, 2 and 2.1: every reading of one prediction."""
    clean, noise, sigma, predicted = inputs["x0"], inputs["eps"], inputs["t"], inputs["v_pred"]
    sample = path.interpolate(clean, noise, sigma)
    noised = sample.noised
    denoised = path.velocity_to_denoised(predicted, noised, sigma)
    noise_estimate = path.velocity_to_noise(predicted, noised, sigma)
    data_velocity, data_time = path.to_data_time(predicted, sigma)
    vp_noised = vp.noised_to_vp(noised, sigma)
    computed = {
        "x_t": noised,
        "v": sample.velocity,
        "x0_from_v": denoised,
        "eps_from_v": noise_estimate,
        "v_from_eps": path.noise_to_velocity(noise_estimate, noised, sigma),
        "v_from_x0": path.denoised_to_velocity(denoised, noised, sigma),
        "score": path.velocity_to_score(predicted, noised, sigma),
        "datatime_tau": data_time,
        "datatime_v": data_velocity,
        "vp_x": vp_noised,
        "vp_alpha_bar": vp.sigma_to_alpha_bar(sigma),
        "vp_vpred": vp.velocity_to_vp_velocity(predicted, noised, sigma),
    }
    return computed.__getitem__


def schedules(inputs: Tensors, config: Mapping[str, list[dict[str, object]]]) -> Callable[[str], Tensor]:
    """Grids, maps from uniform (u) or normal (z) numbers to levels, densities, loss weights."""
    u, z = inputs["u"], inputs["z"]
    sigma = u.clamp(noise_levels.DEFAULT_FLOOR, 1 - noise_levels.DEFAULT_FLOOR)
    patterns: dict[str, Compute] = {
        r"grid(\d+)": lambda index: _grid(config["grids"][int(index)]),
        rf"shift{NUMBER}_of_u": lambda shift: schedule.shift_sigma(u, shift),
        rf"unshift{NUMBER}_of_u": lambda shift: schedule.shift_sigma(u, 1 / shift),
        rf"logit_normal\(m={NUMBER},s={NUMBER}\)_of_z": lambda mean, std: noise_levels.LogitNormal(
            mean, std
        ).from_normal(z),
        rf"mode\({NUMBER}\)_of_u": lambda scale: noise_levels.Mode(scale).quantile(u),
        r"cosmap_of_u": lambda: noise_levels.CosMap().quantile(u),
        rf"beta\({NUMBER},{NUMBER}\)_ppf_of_u": lambda a, b: noise_levels.Beta(a, b).quantile(u),
        rf"pdf_logit_normal\({NUMBER},{NUMBER}\)": lambda m, s: noise_levels.LogitNormal(m, s).density(sigma),
        r"pdf_cosmap": lambda: noise_levels.CosMap().density(sigma),
        r"weight_cosmap": lambda: loss_weights.cosmap(sigma),
        r"weight_sigma_sqrt": lambda: loss_weights.sigma_sqrt(sigma),
        rf"min_snr{NUMBER}_over_snr": lambda gamma: loss_weights.min_snr(sigma, gamma),
        r"snr": lambda: loss_weights.signal_to_noise(sigma),
    }
    return partial(_match, patterns)


def guidances(inputs: Tensors, config: Mapping[str, object]) -> Callable[[str], Tensor]:
    """Section 8; the steps of adaptive projected guidance share one momentum."""
    conditional, unconditional, x = inputs["v_cond"], inputs["v_uncond"], inputs["x"]
    levels = [float(level) for level in config["t"]]
    settings = {name: float(config[name]) for name in ("w", "phi", "eta", "r", "beta")}

    def mixed(rule: guidance.Combine, step: int) -> Tensor:
        scaled = conditional * (1 + 0.1 * step)
        velocity = guidance.guided(
            lambda _x, _sigma: scaled, lambda _x, _sigma: unconditional, settings["w"], combine=rule
        )
        return velocity(x, x.new_full((x.shape[0],), levels[step]))

    def projected(index: float) -> Tensor:
        rule = guidance.apg(
            guidance.ApgMomentum(),
            parallel=settings["eta"],
            norm_limit=settings["r"],
            momentum_factor=settings["beta"],
        )
        return [mixed(rule, step) for step in range(int(index) + 1)][-1]

    patterns: dict[str, Compute] = {
        r"cfg": lambda: mixed(guidance.cfg, 0),
        r"cfg_rescale": lambda: mixed(guidance.cfg_rescale(settings["phi"]), 0),
        r"cfg_zero_star": lambda: mixed(guidance.cfg_zero_star, 0),
        r"cfg_zero_star_alpha": lambda: guidance.zero_star_alpha(conditional, unconditional),
        r"apg_step(\d+)_v": projected,
    }
    return partial(_match, patterns)


def solver_runs(inputs: Tensors, config: Mapping[str, object]) -> Callable[[str], Tensor]:
    """Section 6 on three velocity fields: results at sigma 0, velocities at the start, the true solution."""
    x, grid, noise = inputs["x1"], inputs["grid"], inputs["noise"]
    fields = {"gauss": gauss_field(inputs), "mix": mixture_field(inputs), "net": net_field(inputs)}
    middle = int(config["steps"]) // 2

    def run(solver: Compute, field: path.VelocityFn, **options: object) -> Tensor:
        return solver(field, x, grid, noise=lambda step, _like: noise[step], **options)

    def velocity_at(field: path.VelocityFn, index: int) -> Tensor:
        return field(x, grid[index].expand(x.shape[0]))

    patterns: dict[str, Compute] = {
        r"euler": partial(run, solvers.euler),
        r"midpoint": partial(run, solvers.midpoint),
        r"heun_euler_last": partial(run, solvers.heun),
        r"heun_full": partial(run, solvers.heun, final_step="full"),
        r"rk4": partial(run, solvers.rk4, final_step="full"),
        r"ab2": partial(run, solvers.ab2),
        rf"ddim_eta{NUMBER}": lambda eta, field: run(solvers.ddim, field, eta=eta),
        rf"euler_ancestral_rf_eta{NUMBER}": lambda eta, field: run(solvers.euler_ancestral, field, eta=eta),
        r"dpmpp_2m_logt": partial(run, solvers.dpmpp_2m, lambda_kind="log_t"),
        r"dpmpp_2m_logsnr": partial(run, solvers.dpmpp_2m, lambda_kind="logsnr"),
        r"bosh3_fixed": partial(run, runge_kutta.bosh3_fixed),
        r"dopri5_fixed": partial(run, runge_kutta.dopri5_fixed, final_step="full"),
        r"v_at_grid0": lambda field: velocity_at(field, 0),
        r"v_at_mid": lambda field: velocity_at(field, middle),
        r"true": lambda field: _true_solution(field, x, grid),
        r"exact": lambda field: gauss_flow(inputs, x, float(grid[0]), float(grid[-1])),  # noqa: ARG005
    }

    def find(name: str) -> Tensor:
        field, _, what = name.partition(".")
        return _match(patterns, what, field=fields[field])

    return find


def gauss_field(inputs: Tensors) -> path.VelocityFn:
    """Velocity of Gaussian data with `gauss_mu` and `gauss_s` (section 7.1)."""
    return partial(_gauss_velocity, inputs["gauss_mu"], inputs["gauss_s"])


def gauss_flow(inputs: Tensors, x: Tensor, start: float, end: float) -> Tensor:
    """Closed-form end of the path that stands at x at level start."""
    mean, std = inputs["gauss_mu"], inputs["gauss_s"]

    def spread(sigma: float) -> Tensor:
        return ((1 - sigma) ** 2 * std**2 + sigma**2).sqrt()

    return (1 - end) * mean + spread(end) / spread(start) * (x - (1 - start) * mean)


def mixture_field(inputs: Tensors) -> path.VelocityFn:
    """Velocity of an elementwise mixture of Gaussians (section 7.2)."""
    weights, means, stds = inputs["mix_w"], inputs["mix_m"], inputs["mix_s"]

    def velocity(x: Tensor, sigma: Tensor) -> Tensor:
        x = x.unsqueeze(-1)
        level = sigma.reshape(-1, *[1] * (x.ndim - 1))
        variance = (1 - level) ** 2 * stds**2 + level**2
        log_share = weights.log() - (x - (1 - level) * means) ** 2 / (2 * variance) - variance.log() / 2
        share = torch.softmax(log_share, dim=-1)
        return (share * _gauss_velocity(means, stds, x, sigma)).sum(-1)

    return velocity


def net_field(inputs: Tensors) -> path.VelocityFn:
    """Velocity of a small network of one hidden layer."""

    def velocity(x: Tensor, sigma: Tensor) -> Tensor:
        level = sigma.reshape(-1, 1)
        hidden = torch.tanh(x @ inputs["net_W1"].T + inputs["net_b1"] + level * inputs["net_c1"])
        return hidden @ inputs["net_W2"].T + (1 - 2 * level) * x * inputs["net_a"]

    return velocity


def _gauss_velocity(mean: Tensor, std: Tensor, x: Tensor, sigma: Tensor) -> Tensor:
    level = sigma.reshape(-1, *[1] * (x.ndim - 1))
    slope = (level - (1 - level) * std**2) / ((1 - level) ** 2 * std**2 + level**2)
    return -mean + slope * (x - (1 - level) * mean)


def _true_solution(field: path.VelocityFn, x: Tensor, grid: Tensor) -> Tensor:
    return runge_kutta.dopri5(
        field, x, grid, rtol=1e-12, atol=1e-13, final_step="full", error_norm="sample", max_calls=1_000_000
    )


def _grid(entry: Mapping[str, object]) -> Tensor:
    kind, num_steps, argument = entry["kind"], int(entry["steps"]), float(entry["arg"])
    if kind == "static":
        return schedule.sigma_grid(num_steps, argument)
    if kind == "flux1":
        mu = schedule.flux1_mu(int(argument))
    elif kind == "flux2":
        mu = schedule.flux2_mu(int(argument), num_steps)
    else:
        raise ValueError(f"grid kind must be static, flux1 or flux2, got {kind!r}")
    return schedule.sigma_grid(num_steps, torch.tensor(mu, dtype=torch.float64).exp().item())


def _match(patterns: Mapping[str, Compute], name: str, **keywords: object) -> Tensor:
    """Value of the one pattern that the whole name fits, called with the numbers in the name."""
    for pattern, compute in patterns.items():
        found = re.fullmatch(pattern, name)
        if found:
            return compute(*(float(number) for number in found.groups()), **keywords)
    raise KeyError(f"output {name!r} of a flow file is not known")


KINDS = {
    "conversions": conversions,
    "schedules": schedules,
    "guidance": guidances,
    "solvers": solver_runs,
}
