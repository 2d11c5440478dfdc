"""How long the sampler's simulation takes while a slider of sampler.ipynb moves: 2,000 steps of eight domains.

    python benchmarks/simulation.py

The floor is the sampler's own update, 40 times; the target is 50 ms, which a person takes for at once.
"""

import statistics
import time

from udonlib.lab.explore.simulation import LearningCurve, Setting, simulate


def main() -> None:
    names = [f"domain {number}" for number in range(8)]
    curves = {name: LearningCurve(5.0 + number, 0.1, 500.0 * (number + 1)) for number, name in enumerate(names)}
    setting = Setting(dict.fromkeys(names, 2000), steps=2000, domains_per_batch=8, update_every=50)
    times = []
    for _ in range(20):
        began = time.perf_counter()
        simulate(curves, setting)
        times.append(1000 * (time.perf_counter() - began))
    print(f"one strategy: median {statistics.median(times):.1f} ms, fastest {min(times):.1f} ms (target 50)")


if __name__ == "__main__":
    main()
