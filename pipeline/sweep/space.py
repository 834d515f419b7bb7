"""The search space of a sweep: W&B's distributions, as points of a grid, as random draws, and for a search.

Names, keys and semantics are those of https://docs.wandb.ai/models/sweeps/sweep-config-keys.
"""

import bisect
import itertools
import math
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from pipeline.common.randomness import uniforms
from pipeline.common.suggestions import did_you_mean

Spec = Mapping[str, Any]

EDGE = 1e-9  # fractions of a normal distribution's quantiles are clamped this far from 0 and 1, where quantiles are infinite
BETA_DRAWS = 200_000  # a beta distribution's quantiles are estimated from this many draws


@dataclass(frozen=True)
class Distribution:
    """A row of DISTRIBUTIONS.

    needs: required keys; defaults: optional keys and their defaults; bounds: lowest and highest number to draw, and whether to
    draw its logarithm uniformly; value: maps the drawn number to the setting's value.
    """

    needs: tuple[str, ...]
    defaults: Mapping[str, float]
    bounds: Callable[[Spec], tuple[float, float, bool]]
    value: Callable[[float, Spec], Any]


def quantized(distribution: Distribution) -> Distribution:
    """The distribution rounded to multiples of q; the values are integers if q is one."""

    def value(drawn: float, spec: Spec) -> float:
        steps = round(distribution.value(drawn, spec) / spec["q"])
        return steps * spec["q"] if isinstance(spec["q"], int) else float(f"{steps * spec['q']:.12g}")

    defaults = {**distribution.defaults, "q": 1}
    return Distribution(distribution.needs, defaults, distribution.bounds, value)


def normal(drawn: float, spec: Spec) -> float:
    return spec["mu"] + spec["sigma"] * statistics.NormalDist().inv_cdf(min(max(drawn, EDGE), 1 - EDGE))


def beta(drawn: float, spec: Spec) -> float:
    draws = np.random.default_rng(0).beta(spec["a"], spec["b"], BETA_DRAWS)
    return float(np.quantile(draws, drawn))


def with_probability(drawn: float, spec: Spec) -> Any:
    shares = list(itertools.accumulate(spec["probabilities"]))
    return spec["values"][min(bisect.bisect_right(shares, drawn * shares[-1]), len(shares) - 1)]


def as_drawn(drawn: float, spec: Spec) -> float:
    return drawn


MIN_MAX, MU_SIGMA, A_B = ("min", "max"), {"mu": 0.0, "sigma": 1.0}, {"a": 1.0, "b": 1.0}
UNIFORM = Distribution(MIN_MAX, {}, lambda spec: (spec["min"], spec["max"], False), as_drawn)
LOG_UNIFORM = Distribution(MIN_MAX, {}, lambda spec: (math.exp(spec["min"]), math.exp(spec["max"]), True), as_drawn)
LOG_UNIFORM_VALUES = Distribution(MIN_MAX, {}, lambda spec: (spec["min"], spec["max"], True), as_drawn)
NORMAL = Distribution((), MU_SIGMA, lambda spec: (0.0, 1.0, False), normal)
LOG_NORMAL = Distribution((), MU_SIGMA, NORMAL.bounds, lambda drawn, spec: math.exp(normal(drawn, spec)))
BETA = Distribution((), A_B, NORMAL.bounds, beta)

# log(1/X) uniform between a and b is log(X) uniform between -b and -a
INV_LOG_UNIFORM = Distribution(
    MIN_MAX, {}, lambda spec: (math.exp(-spec["max"]), math.exp(-spec["min"]), True), as_drawn
)

DISTRIBUTIONS = {
    "constant": Distribution(("value",), {}, lambda spec: (0, 0, False), lambda drawn, spec: spec["value"]),
    "categorical": Distribution(
        ("values",),
        {},
        lambda spec: (0, len(spec["values"]) - 1, False),
        lambda drawn, spec: spec["values"][int(drawn)],
    ),
    "categorical_w_probabilities": Distribution(("values", "probabilities"), {}, NORMAL.bounds, with_probability),
    "int_uniform": Distribution(MIN_MAX, {}, UNIFORM.bounds, lambda drawn, spec: int(drawn)),
    "uniform": UNIFORM,
    "q_uniform": quantized(UNIFORM),
    "log_uniform": LOG_UNIFORM,
    "q_log_uniform": quantized(LOG_UNIFORM),
    "log_uniform_values": LOG_UNIFORM_VALUES,
    "q_log_uniform_values": quantized(LOG_UNIFORM_VALUES),
    "inv_log_uniform": INV_LOG_UNIFORM,
    "inv_log_uniform_values": LOG_UNIFORM_VALUES,
    "normal": NORMAL,
    "q_normal": quantized(NORMAL),
    "log_normal": LOG_NORMAL,
    "q_log_normal": quantized(LOG_NORMAL),
    "beta": BETA,
    "q_beta": quantized(BETA),
}
WHOLE = ("constant", "categorical", "int_uniform")  # distributions whose drawn number is an integer
GRID = ("constant", "categorical", "categorical_w_probabilities", "int_uniform", "q_uniform")


@dataclass(frozen=True)
class Parameter:
    """A setting of a sweep. spec: its keys in the file, with the defaults filled in."""

    name: str
    distribution: str
    spec: Spec

    @property
    def is_varied(self) -> bool:
        return self.distribution != "constant"

    @property
    def bounds(self) -> tuple[float, float, bool]:
        """Lowest and highest number to draw, and whether to draw its logarithm uniformly."""
        return DISTRIBUTIONS[self.distribution].bounds(self.spec)

    def value(self, drawn: float) -> Any:
        """The setting's value for a number within the bounds."""
        return DISTRIBUTIONS[self.distribution].value(drawn, self.spec)

    def quantile(self, fraction: float) -> Any:
        """The quantile of the distribution. fraction: from 0 to 1."""
        low, high, is_log = self.bounds
        if self.distribution in WHOLE:
            return self.value(min(low + math.floor(fraction * (high - low + 1)), high))
        if is_log:
            return self.value(min(max(low * (high / low) ** fraction, low), high))
        return self.value(low + fraction * (high - low))

    def grid(self) -> list[Any]:
        """Every value, in order. Raises ValueError for a distribution without a finite list of values."""
        low, high, _ = self.bounds
        if self.distribution not in GRID:
            raise ValueError(
                f"Parameter {self.name} is {self.distribution}, which method grid cannot enumerate. "
                "List its values, or use method random or bayes."
            )
        if "values" in self.spec:
            return list(self.spec["values"])
        if self.distribution == "q_uniform":
            steps = math.floor((high - low) / self.spec["q"] + 1e-9)
            return list(dict.fromkeys(self.value(low + step * self.spec["q"]) for step in range(steps + 1)))
        return [self.value(number) for number in range(int(low), int(high) + 1)]

    def examples(self) -> list[Any]:
        """Values to check before the first trial: all listed values, else the ends of the range."""
        return list(self.spec.get("values", [])) or [self.quantile(0.0), self.quantile(1.0)]


def read_parameter(name: str, spec: Any) -> Parameter:
    """Reads a parameter of the file. Raises ValueError if it does not follow W&B's format."""
    if not isinstance(spec, dict):
        raise ValueError(f"Parameter {name} is {spec!r}; write {{value: {spec}}}, or {{values: [...]}} to vary it.")
    if "parameters" in spec:
        raise ValueError(f"Parameter {name} is nested, but the settings of train.py are flat. Move them to the top level.")
    kind = spec["distribution"] if "distribution" in spec else implied_distribution(name, spec)
    if kind not in DISTRIBUTIONS:
        raise ValueError(
            f"Unknown distribution {kind!r} of parameter {name}.{did_you_mean(str(kind), DISTRIBUTIONS)} "
            f"Known: {', '.join(DISTRIBUTIONS)}."
        )
    row = DISTRIBUTIONS[kind]
    keys = {"distribution", *row.needs, *row.defaults}
    for key in spec:
        if key not in keys:
            raise ValueError(f"Parameter {name} is {kind} and has no key {key!r}.{did_you_mean(str(key), keys)}")
    for key in row.needs:
        if key not in spec:
            raise ValueError(f"Parameter {name} is {kind} and needs the key {key!r}.")
    parameter = Parameter(name, kind, {**row.defaults, **spec})
    check_numbers(parameter)
    return parameter


def implied_distribution(name: str, spec: Spec) -> str:
    """The distribution that W&B assumes if the file names none. Raises ValueError if the keys do not determine it."""
    if "value" in spec:
        return "constant"
    if "values" in spec:
        return "categorical_w_probabilities" if "probabilities" in spec else "categorical"
    if {"min", "max"} <= spec.keys():
        return "int_uniform" if isinstance(spec["min"], int) and isinstance(spec["max"], int) else "uniform"
    known = ("value", "values", "min", "max", "distribution")
    wrong = next(iter(spec), "")
    raise ValueError(f"Parameter {name} has neither value, values, nor min and max.{did_you_mean(str(wrong), known)}")


def check_numbers(parameter: Parameter) -> None:
    """Raises ValueError for invalid numbers, a min above max, or values listed twice."""
    name, spec = parameter.name, parameter.spec
    for key, value in spec.items():
        if key in ("min", "max", "mu", "sigma", "q", "a", "b") and (
            isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value)
        ):
            hint = " In YAML an exponent needs a point: 1.0e-5." if isinstance(value, str) else ""
            raise ValueError(f"Parameter {name}: {key} is {value!r}, not a number.{hint}")
    wrong = {
        "values": "values" in spec and (not isinstance(spec["values"], list) or not spec["values"]),
        "min": "min" in spec and spec["min"] > spec["max"],
        "q": spec.get("q", 1) <= 0,
        "sigma": spec.get("sigma", 1) < 0,
        "a": spec.get("a", 1) <= 0,
        "b": spec.get("b", 1) <= 0,
    }
    wrong["min"] |= not wrong["min"] and parameter.distribution.endswith("_values") and spec["min"] <= 0
    if parameter.distribution == "int_uniform":
        wrong["min"] |= not (isinstance(spec["min"], int) and isinstance(spec["max"], int))
    for key, is_wrong in wrong.items():
        if is_wrong:
            shown = f"{spec['min']} and max {spec['max']}" if key == "min" else repr(spec[key])
            raise ValueError(f"Parameter {name}: {key} is {shown}, which is invalid for {parameter.distribution}.")
    if "values" in spec:
        check_values(name, spec["values"], spec.get("probabilities"))


def check_values(name: str, values: Sequence[Any], probabilities: Any) -> None:
    """Raises ValueError for a repeated value, and unless there is one probability for each value and they sum to 1."""
    texts = [str(value) for value in values]
    for text in texts:
        if texts.count(text) > 1:
            raise ValueError(f"Parameter {name} lists the value {text} twice.")
    if probabilities is None:
        return
    numbers = isinstance(probabilities, list) and all(
        isinstance(share, (int, float)) and not isinstance(share, bool) and share >= 0 for share in probabilities
    )
    if not numbers or len(probabilities) != len(values) or abs(sum(probabilities) - 1) > 1e-6:
        raise ValueError(
            f"Parameter {name}: probabilities {probabilities!r} must be {len(values)} shares that sum to 1."
        )


@dataclass(frozen=True)
class Space:
    """All parameters of a sweep, in the order of the file."""

    parameters: tuple[Parameter, ...]

    @property
    def varied(self) -> list[str]:
        return [parameter.name for parameter in self.parameters if parameter.is_varied]

    def grid_size(self) -> int:
        """The number of points in the grid. Raises ValueError if a parameter has no finite list of values."""
        return math.prod(len(parameter.grid()) for parameter in self.parameters)

    def grid_point(self, number: int) -> dict[str, Any]:
        """The settings of a point of the grid, counted from 0; the last parameter changes fastest."""
        point = {}
        for parameter in reversed(self.parameters):
            values = parameter.grid()
            number, index = divmod(number, len(values))
            point[parameter.name] = values[index]
        return {parameter.name: point[parameter.name] for parameter in self.parameters}

    def random_point(self, number: int, seed: int) -> dict[str, Any]:
        """The settings of a random draw: a pure function of its number, counted from 0, and the seed."""
        fractions = uniforms(np.array([number]), len(self.parameters), seed)[0]
        return {
            parameter.name: parameter.quantile(float(fraction))
            for parameter, fraction in zip(self.parameters, fractions)
        }

    def examples(self) -> Iterator[dict[str, Any]]:
        """A few points that together contain every value to check."""
        first = {parameter.name: parameter.examples()[0] for parameter in self.parameters}
        yield first
        for parameter in self.parameters:
            for value in parameter.examples()[1:]:
                yield {**first, parameter.name: value}
