"""Measures how often the confidence interval of an accuracy contains the true accuracy.

    python tools/simulate_intervals.py

The success rates of the problems follow a beta distribution whose mean is the true accuracy. Each line shows a
distribution, a number of problems, and the coverage for 1 to 32 samples per problem.
"""

import numpy as np

from trapo_jax.evaluation.statistics import accuracy_interval

DISTRIBUTIONS = ((0.3, 0.3), (1.0, 1.0), (2.0, 2.0), (0.2, 0.8), (4.0, 1.0), (0.3, 2.7))
NUM_PROBLEMS = (30, 100, 500)
NUM_SAMPLES = (1, 2, 4, 8, 16, 32)
REPEATS = 5_000


def coverage(a: float, b: float, *, num_problems: int, num_samples: int, repeats: int) -> float:
    """Returns the fraction of simulated evaluations whose interval contains the accuracy a / (a + b)."""
    rng = np.random.default_rng(0)
    rates = rng.beta(a, b, size=(repeats, num_problems))
    results = rng.binomial(num_samples, rates) / num_samples
    intervals = np.array([accuracy_interval(result) for result in results])
    return float(np.mean((intervals[:, 0] <= a / (a + b)) & (a / (a + b) <= intervals[:, 1])))


def main() -> None:
    print(
        f"{'success rates':>16} {'problems':>9}  coverage with {', '.join(map(str, NUM_SAMPLES))} samples"
    )
    for a, b in DISTRIBUTIONS:
        for n in NUM_PROBLEMS:
            found = [
                coverage(a, b, num_problems=n, num_samples=k, repeats=REPEATS) for k in NUM_SAMPLES
            ]
            print(
                f"{f'beta({a}, {b})':>16} {n:>9}  {'  '.join(f'{c:.3f}' for c in found)}",
                flush=True,
            )


if __name__ == "__main__":
    main()
