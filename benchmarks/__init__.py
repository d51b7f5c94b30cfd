"""One module a benchmark: its files, prompts, metrics and settings, in a `data.Benchmark`; each is named here."""

from benchmarks import builtin, muse, rwku, tofu, town

ALL = {room.BENCHMARK.name: room.BENCHMARK for room in (builtin, rwku, muse, tofu, town)}
FORMS = {"TOFU_EVAL.json": (tofu.BENCHMARK, tofu.to_open_unlearning)}  # names of a result's file that ask for a form
