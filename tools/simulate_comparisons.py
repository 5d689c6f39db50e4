"""Measures the coverage and the false-positive rate of the intervals used to compare methods.

    python tools/simulate_comparisons.py [--repeats 1000] [--power]

Each repetition simulates two methods of the same kind, with several seeds each, on the same problems. Each line shows,
for the mean, the median and the interquartile mean over seeds, how often one method's interval contains the true value,
the interval's mean width, and how often the difference between the methods is found to be significant although the true
difference is 0. `--power` shows instead how often a true difference is detected when 15 pairs of methods are compared.
"""

import argparse
import dataclasses
from collections.abc import Callable

import numpy as np

from trapo_jax.comparison.statistics import LEVEL, STATISTICS, draw, point_estimate

NUM_PROBLEMS, NUM_SAMPLES = 100, 8
NUM_TEST_PROBLEMS, NUM_PAIRS = 256, 15
NUM_DRAWS = 2_000
NUM_SEEDS = (6, 10, 20, 30)
GOOD, BAD = 0.85, 0.3
POPULATION = 20_000

Draw = Callable[[np.random.Generator, int], np.ndarray]


@dataclasses.dataclass(frozen=True)
class Case:
    """A synthetic method, defined by how its solve rates vary.

    Attributes:
      name: the sources of variation between runs.
      problems: draws the `[1, problems]` solve rates common to all seeds, given a generator and the number of problems.
      seeds: draws the `[seeds, 1]` offsets of the seeds from these rates, given a generator and the number of seeds.
    """

    name: str
    problems: Draw
    seeds: Draw

    def true_value(self, statistic: str) -> float:
        """Returns the true value of a statistic, computed over a large population of seeds and problems."""
        rng = np.random.default_rng(0)
        common = self.problems(rng, POPULATION)
        by_seed = [np.clip(common + x, 0, 1).mean() for x in self.seeds(rng, 4_000)[:, 0]]
        return point_estimate(np.array(by_seed)[:, None], STATISTICS[statistic])


EQUAL_PROBLEMS: Draw = lambda _, count: np.full((1, count), GOOD)
DIFFERENT_PROBLEMS: Draw = lambda rng, count: rng.beta(2.8, 1.2, size=(1, count))
EQUAL_SEEDS: Draw = lambda _, count: np.zeros((count, 1))
DIFFERENT_SEEDS: Draw = lambda rng, count: rng.normal(0, 0.05, size=(count, 1))


def failing_seeds(rate: float) -> Draw:
    """Returns a function that draws seeds, each of which fails with probability `rate`."""
    return lambda rng, count: np.where(rng.random((count, 1)) < rate, BAD - GOOD, 0.0)


CASES = (
    Case("sampling noise only", EQUAL_PROBLEMS, EQUAL_SEEDS),
    Case("seeds, sd 0.05", EQUAL_PROBLEMS, DIFFERENT_SEEDS),
    Case("seeds and problems", DIFFERENT_PROBLEMS, DIFFERENT_SEEDS),
    Case("40% of seeds fail", EQUAL_PROBLEMS, failing_seeds(0.4)),
    Case("10% of seeds fail", EQUAL_PROBLEMS, failing_seeds(0.1)),
)


@dataclasses.dataclass(frozen=True)
class Quality:
    """The coverage and the mean width of an interval, and the false-positive rate."""

    coverage: float
    width: float
    false_positives: float


def simulate(case: Case, *, num_seeds: int, statistic: str, repeats: int) -> Quality:
    """Simulates many comparisons of two methods of the same kind, and returns the quality of their intervals."""
    rng = np.random.default_rng(0)
    function, true_value = STATISTICS[statistic], case.true_value(statistic)
    covered, widths, found = [], [], []
    for _ in range(repeats):
        problems = case.problems(rng, NUM_PROBLEMS)
        a, b = (
            draw(sampled(case, problems, num_seeds, rng), function, stream=i, num_draws=NUM_DRAWS)
            for i in (1, 2)
        )
        low, high = a.interval()
        covered.append(low <= true_value <= high)
        widths.append(high - low)
        found.append((a - b).p_value() < LEVEL)
    return Quality(*(float(np.mean(x)) for x in (covered, widths, found)))


def sampled(
    case: Case, problems: np.ndarray, num_seeds: int, rng: np.random.Generator
) -> np.ndarray:
    """Returns the `[seeds, problems]` scores of a method: fractions of correct samples."""
    rates = np.clip(problems + case.seeds(rng, num_seeds), 0, 1)
    return rng.binomial(NUM_SAMPLES, rates) / NUM_SAMPLES


def power(difference: float, *, sd: float, num_seeds: int, statistic: str, repeats: int) -> float:
    """Returns how often the difference between two methods is significant after a correction for 15 comparisons.

    Args:
      difference: true difference in accuracy.
      sd: standard deviation over seeds.
      num_seeds: number of seeds of each method.
      statistic: name of the statistic to compare.
      repeats: number of simulated comparisons.
    """
    rng = np.random.default_rng(0)
    found = []
    for _ in range(repeats):
        problems = DIFFERENT_PROBLEMS(rng, NUM_TEST_PROBLEMS)
        draws = []
        for stream, shift in enumerate((0.0, -difference), start=1):
            rates = np.clip(problems + shift + rng.normal(0, sd, size=(num_seeds, 1)), 0, 1)
            scores = rng.binomial(4, rates) / 4
            draws.append(draw(scores, STATISTICS[statistic], stream=stream, num_draws=4_000))
        found.append((draws[0] - draws[1]).p_value() < LEVEL / NUM_PAIRS)
    return float(np.mean(found))


def show_power(repeats: int) -> None:
    """Prints a table of the power for several true differences."""
    print("| seeds | difference | sd of seeds | found in the mean | in the median |")
    print("|---|---|---|---|---|")
    for num_seeds in (12, 20, 30):
        for difference in (0.05, 0.1, 0.2):
            for sd in (0.02, 0.05):
                options = {"sd": sd, "num_seeds": num_seeds, "repeats": repeats}
                cells = [
                    f"{power(difference, statistic=name, **options):.0%}"
                    for name in ("mean", "median")
                ]
                row = [str(num_seeds), f"{difference:g}", f"{sd:g}", *cells]
                print(f"| {' | '.join(row)} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--repeats", type=int, default=1000)
    parser.add_argument("--power", action="store_true")
    args = parser.parse_args()
    repeats = args.repeats
    if args.power:
        return show_power(repeats)
    print("coverage, width and false-positive rate for")
    print(f"{'':>20} {'seeds':>5}  " + "  ".join(f"{name:^21}" for name in STATISTICS))
    for case in CASES:
        for num_seeds in NUM_SEEDS:
            results = [
                simulate(case, num_seeds=num_seeds, statistic=name, repeats=repeats)
                for name in STATISTICS
            ]
            cells = [f"{q.coverage:.3f}  {q.width:.3f}  {q.false_positives:.3f}" for q in results]
            print(f"{case.name:>20} {num_seeds:>5}  " + "  ".join(cells), flush=True)


if __name__ == "__main__":
    main()
