"""One module a benchmark: its files, prompts, limits, metrics, columns and settings, gathered in a `data.Benchmark`.

To add one, write such a module and name it here.
"""

from benchmarks import builtin, muse, rwku, tofu

ALL = {benchmark.name: benchmark for benchmark in (builtin.BENCHMARK, rwku.BENCHMARK, muse.BENCHMARK, tofu.BENCHMARK)}
