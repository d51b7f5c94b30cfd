"""The report's statistics a second time: plain Python over records.json, with nothing of the code that it checks.

Slow and simple on purpose. It reads `claims.json` and `families.json`, which say what is compared, as data.
"""

import json
import math
from functools import cache
from pathlib import Path
from statistics import NormalDist

import numpy as np

ROOT = Path(__file__).resolve().parents[2]
TITLES = {"rule": "RULE", "rerule": "ReRULE"}
RATES = ("4e-5", "8e-5", "1.6e-4", "3.2e-4", "6.4e-4")
NORMAL = NormalDist()


# --- statistics ------------------------------------------------------------------------------------------------------


def mean(values):
    return math.fsum(values) / len(values)


def sd(values):
    middle = mean(values)
    return math.sqrt(math.fsum((x - middle) ** 2 for x in values) / (len(values) - 1))


def t_tail(t, df):
    """P(T > t) for t ≥ 0: with T = √df tan θ the density is a multiple of cos^(df − 1) θ; Simpson's rule."""

    def area(low, n=2000):
        h = (math.pi / 2 - low) / n
        heights = [math.cos(low + i * h) ** (df - 1) for i in range(n + 1)]
        return h / 3 * (heights[0] + heights[-1] + 4 * math.fsum(heights[1:-1:2]) + 2 * math.fsum(heights[2:-1:2]))

    return area(math.atan(t / math.sqrt(df))) / area(0) / 2


@cache
def t_quantile(df):
    """The t that leaves 2.5 % above it, by bisection."""
    low, high = 0.0, 100.0
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if t_tail(middle, df) > 0.025 else (low, middle)
    return low


def shapiro(values):
    """p of the Shapiro–Wilk test for 6 to 11 values (Royston 1995, algorithm AS R94)."""
    x, n = sorted(values), len(values)
    assert 6 <= n <= 11
    m = [NORMAL.inv_cdf((i - 0.375) / (n + 0.25)) for i in range(1, n + 1)]
    total, u = sum(y * y for y in m), n**-0.5
    last = m[-1] / total**0.5 + sum(c * u**k for k, c in enumerate(
        (0.221157, -0.147981, -2.07119, 4.434685, -2.706056), 1))  # fmt: skip
    other = m[-2] / total**0.5 + sum(c * u**k for k, c in enumerate(
        (0.042981, -0.293762, -1.752461, 5.682633, -3.582633), 1))  # fmt: skip
    phi = (total - 2 * m[-1] ** 2 - 2 * m[-2] ** 2) / (1 - 2 * last**2 - 2 * other**2)
    a = [-last, -other, *(y / phi**0.5 for y in m[2:-2]), other, last]
    w = sum(p * q for p, q in zip(a, x, strict=True)) ** 2 / sum((y - mean(x)) ** 2 for y in x)
    z = -math.log(-2.273 + 0.459 * n - math.log(1 - w))
    centre = 0.5440 - 0.39978 * n + 0.025054 * n**2 - 0.0006714 * n**3
    return 1 - NORMAL.cdf((z - centre) / math.exp(1.3822 - 0.77857 * n + 0.062767 * n**2 - 0.0020322 * n**3))


def kind_of(values):
    if max(values) - min(values) < 1e-9:
        return "="
    return "BCa" if len(values) >= 8 and shapiro(values) < 0.01 else "t"


def interval(values):
    """(low, high, kind) of the mean, 95 %."""
    n, kind, middle = len(values), kind_of(values), mean(values)
    if kind == "=":
        return middle, middle, kind
    if kind == "t":
        half = t_quantile(n - 1) * sd(values) / math.sqrt(n)
        return middle - half, middle + half, kind
    draws = np.random.default_rng(0).integers(0, n, (9999, n))
    means = sorted(float(x) for x in np.array(values)[draws].mean(1))
    centre = float(np.mean(values))
    below = (sum(x < centre for x in means) + sum(x <= centre for x in means)) / 2 / len(means)
    z0 = NORMAL.inv_cdf(below)
    without = [mean(values[:i] + values[i + 1 :]) for i in range(n)]
    off = [mean(without) - x for x in without]
    a = sum(x**3 for x in off) / (6 * sum(x**2 for x in off) ** 1.5)
    ends = []
    for z in (NORMAL.inv_cdf(0.025), NORMAL.inv_cdf(0.975)):
        place = NORMAL.cdf(z0 + (z0 + z) / (1 - a * (z0 + z))) * (len(means) - 1)
        at = min(int(place), len(means) - 2)
        ends.append(means[at] + (place - at) * (means[at + 1] - means[at]))
    return *ends, kind


def p_value(values, edge, sides):
    """p that the mean is the edge; one-sided on the side on which it lies."""
    off = [x - edge for x in values]
    if kind_of(values) == "=":
        return 1.0 if abs(off[0]) < 1e-9 else 0.0
    return sides * t_tail(abs(mean(off)) / (sd(values) / math.sqrt(len(values))), len(values) - 1)


def holm(ps):
    """The k-th smallest of m p's becomes the largest of (m − j + 1) times the j-th smallest, j ≤ k, and at most 1."""
    order, found = sorted(range(len(ps)), key=lambda i: ps[i]), {}
    for rank, i in enumerate(order):
        found[i] = max(min(1.0, ps[j] * (len(ps) - k)) for k, j in enumerate(order[: rank + 1]))
    return [found[i] for i in range(len(ps))]


# --- records ---------------------------------------------------------------------------------------------------------


def value_of(character):
    return 0.5 if character == "=" else "0123456789abcdefg".index(character) / 16


def groups(run, method):
    """[[(prompt, mean reward) of a step] of every step]."""
    return [
        [(int(asked[2 * i : 2 * i + 2], 36), value_of(c)) for i, c in enumerate(step)]
        for asked, step in zip(run["queries"], run["methods"][method]["rewards"], strict=False)
    ]


def early(base):
    """{prompt: its groups' rewards under RULE before ReRULE replays}."""
    first, seen = base["methods"]["rerule"]["first_replay"], {}
    for step in groups(base, "rule")[: len(base["queries"]) if first is None else first - 1]:
        for prompt, reward in step:
            seen.setdefault(prompt, []).append(reward)
    return seen


def late(run, method):
    """[(prompt, reward)] of the last third of the steps."""
    steps = groups(run, method)
    return [group for step in steps[len(steps) - len(steps) // 3 :] for group in step]


def balance(row):
    a, b = 100 - row["forget_recall"], row["retain_recall"]
    return 0.0 if row.get("stopped") or not a or not b else 2 / (1 / a + 1 / b)


class Records:
    """The runs of a folder's records.json."""

    def __init__(self, folder):
        self.runs = json.loads((folder / "records.json").read_text(encoding="utf-8"))["runs"]
        self.selection = {run["seed"] for run in self.runs.values() if run["family"] == "select"}
        self.chosen = {curve: self.best_rate(curve) for curve in ("rule", "rerule", "random", "recent", "current")}
        self.chosen |= dict.fromkeys(("steps", "compute"), self.chosen["rule"])

    def family(self, name):
        """{seed: run} on the report's seeds."""
        runs = {run["seed"]: run for run in self.runs.values() if run["family"] == name}
        return {seed: run for seed, run in sorted(runs.items()) if seed not in self.selection}

    def best_rate(self, curve):
        """The rate with the best mean balance on the selection seeds, where all replayed."""
        best = {}
        for rate in RATES:
            family, method = place(curve, rate, "select")
            runs = [self.runs.get(f"{family}_{seed}") for seed in sorted(self.selection)]
            if not runs or None in runs:
                return None
            if method == "rule" or all(run["methods"][method]["first_replay"] is not None for run in runs):
                best[rate] = mean([balance(run["rows"][TITLES[method]]) for run in runs])
        return max(best, key=best.get)

    def number(self, family, seed, run, method, column):
        """One figure of one method of one run; None where it is not there."""
        if "models" in run:
            region, name = column.split("_")
            return run["models"][method].get(region, {}).get(name)
        own = family in ("base", "select", "world0", "world30", "town", "tofu", "book", "rwku")
        base = self.family(family if own else "town" if family[:5] == "town_" else "base").get(seed)
        row = run["rows"].get(TITLES.get(method, method), {})
        if column == "hard" and "hard_trained_recall" in row:  # four phrasings trained on, two held out
            return (4 * row["hard_trained_recall"] + 2 * row["hard_heldout_recall"]) / 6
        if column == "balance":
            return balance(row) if "retain_recall" in row else None
        if column == "heldout":  # 22 of the 42 neighbours have crossed names
            return (22 * row["hard_heldout_recall"] + 20 * row["easy_heldout_recall"]) / 42
        if column == "seconds_stage2":
            return sum(
                run["methods"][method][f"seconds_{part}"] for part in ("rollout", "reference", "update", "replay")
            )
        if column == "late_unrest":
            return rough(run["methods"][method]["evaluations"])
        if column == "late_below":
            hard = {prompt for prompt, rewards in early(base).items() if mean(rewards) < base["tau"]}
            visits = {prompt: [r for q, r in late(run, method) if q == prompt] for prompt in hard}
            low = [mean(rewards) < base["tau"] for rewards in visits.values() if rewards]
            return 100 * sum(low) / len(low) if low else None
        if column in ("below_hard", "below_easy"):
            seen = {prompt: rewards for prompt, rewards in early(base).items() if base["kinds"][prompt] == column[6]}
            below = [reward < base["tau"] for rewards in seen.values() for reward in rewards]
            return mean(below) if below else None
        if column[:5] == "late_":
            before = {prompt: mean(rewards) < base["tau"] for prompt, rewards in early(base).items()}
            hardest = {case[0] for case in base["cases"]}
            wanted = {"hard": lambda q: before.get(q) is True, "easy": lambda q: before.get(q) is False,
                      "cases": hardest.__contains__}[column[5:]]  # fmt: skip
            found = [reward for prompt, reward in late(run, method) if wanted(prompt)]
            return mean(found) if found else None
        return row.get(column)

    def column(self, where, method, column, strict=True):
        """{seed: number} of one side of a comparison; strict: None where a run was to replay and never did."""
        family = where
        if where[0] == "@":
            rate, whose = where[1:].split(":") if ":" in where else (where[1:], method)
            rate = self.chosen[whose] if rate == "chosen" else rate
            if rate is None:
                return None
            family, method = place(method, rate, "base")
        runs = self.family(family)
        ran = {seed: run for seed, run in runs.items()
               if method != "rerule" or run["methods"]["rerule"]["first_replay"] is not None}  # fmt: skip
        if strict and len(ran) < len(runs):
            return None
        found = {seed: self.number(family, seed, run, method, column) for seed, run in ran.items()}
        return {seed: x for seed, x in found.items() if x is not None}

    def difference(self, of, less, way="difference", times=1, strict=True):
        """[one number a seed] of a comparison; None where it cannot be made."""
        if isinstance(of[0], list):
            pairs = [[self.column(*side, strict) for side in pair] for pair in (of, less)]
            if None in pairs[0] + pairs[1]:
                return None
            a, b = ({seed: x[seed] - y[seed] for seed in sorted(x) if seed in y} for x, y in pairs)
        else:
            a, b = self.column(*of, strict), self.column(*less, strict) if less else {}
        if a is None or b is None:
            return None
        if not less:
            return [times * a[seed] for seed in sorted(a)]
        turn = {"difference": lambda x, y: x - y, "percent": lambda x, y: 100 * x / y,
                "extra": lambda x, y: 100 * (x - y) / y,
                "log10": lambda x, y: math.log10(x) - math.log10(y)}[way]  # fmt: skip
        return [times * turn(a[seed], b[seed]) for seed in sorted(a) if seed in b]

    # --- measures that are no plain difference ---

    def tau_fall(self):
        rows = [(t, self.column(f, "rerule", "retain_recall"))
                for t, f in ((0.4, "@4e-5"), (0.6, "tau0.6"), (0.8, "tau0.8"), (1.0, "tau1.0"))]  # fmt: skip
        if any(row is None for _, row in rows):
            return None
        common = set.intersection(*(set(row) for _, row in rows))
        # least squares: Σ (t − t̄) y / Σ (t − t̄)², t̄ = 0.7, Σ (t − t̄)² = 0.2
        return [-0.6 * sum((t - 0.7) * row[seed] for t, row in rows) / 0.2 for seed in sorted(common)]

    def bound_correlations(self):
        named = json.loads((ROOT / "reproduce" / "families.json").read_text(encoding="utf-8"))["families"]
        points = {}
        for family in [family for family, row in named.items() if "in_bound" in row]:
            for seed, run in self.family(family).items():
                base, ran = self.family("base")[seed], run["methods"]["rerule"]
                if ran["first_replay"] is None:
                    return None
                below = [r < run["tau"] for rewards in early(base).values() for r in rewards]
                on = mean(below) * ran["response_tokens"]
                used = ran["replay_groups"] - ran["replay_skipped"]
                again = used * ran["response_tokens"] / sum(map(len, ran["rewards"]))
                own, rule = (self.number(f, seed, x, m, "late_hard") for f, x, m in (
                    (family, run, "rerule"), ("base", base, "rule")))  # fmt: skip
                if on and None not in (own, rule):
                    bound = math.sqrt(on / (on + (ran["ess"] or 0) * again))
                    points.setdefault(seed, []).append((1 - bound, own - rule))
        found = [spearman(*zip(*rows, strict=True)) for rows in points.values() if len(rows) >= 4]
        return [x for x in found if x is not None]


def place(curve, rate, first):
    """(family, method) of a curve of the main figure."""
    if curve in TITLES and (curve, rate) != ("rerule", RATES[0]):  # ReRULE starts replay otherwise in the base runs
        return (first if rate == RATES[0] else f"grid@{rate}"), curve
    return f"{curve}@{rate}", "rule" if curve in ("steps", "compute") else "rerule"


def rough(evaluations):
    """sd about a least-squares line of retain recall over the last third of the steps."""
    end = max(row["step"] for row in evaluations)
    points = [(row["step"], row["retain_recall"]) for row in evaluations if 3 * row["step"] > 2 * end]
    if len(points) < 3:
        return None
    x, y = (mean(side) for side in zip(*points, strict=True))
    b = sum((p - x) * (q - y) for p, q in points) / sum((p - x) ** 2 for p, _ in points)
    return math.sqrt(sum((q - y - b * (p - x)) ** 2 for p, q in points) / (len(points) - 2))


def spearman(x, y):
    """Pearson's correlation of the ranks, equals sharing theirs."""
    ranks = [[sum(w < v for w in side) + (sum(w == v for w in side) + 1) / 2 for v in side] for side in (x, y)]
    a, b = ([v - mean(side) for v in side] for side in ranks)
    size = math.sqrt(sum(v * v for v in a) * sum(v * v for v in b))
    return sum(p * q for p, q in zip(a, b, strict=True)) / size if size else None


# --- verdicts --------------------------------------------------------------------------------------------------------


def best_baseline():
    scores = json.loads((ROOT / "results" / "rates_builtin.json").read_text(encoding="utf-8"))
    best = {name: max(mean(x) for x in row["scores"].values()) for name, row in scores.items() if name != "purge"}
    return {"po": "PO"}[max(best, key=best.get)]


@cache
def opinion(folder):
    """[(claim's text, verdict, [part])]; part: None without figures, else a dict of its numbers."""
    r, rival, found, every = Records(folder), best_baseline(), [], []
    for claim in json.loads((ROOT / "reproduce" / "claims.json").read_text(encoding="utf-8")):
        parts = []
        for row in claim["parts"]:
            if "measure" in row:
                values = getattr(r, row["measure"])()
            else:
                of, less = (json.loads(json.dumps(row.get(x)).replace("{rival}", rival)) for x in ("of", "less"))
                values = r.difference(of, less, row.get("as", "difference"), row.get("times", 1))
            edges = [-row["within"], row["within"]] if "within" in row else [row.get("bar", 0)]
            parts.append({"n": len(values or ()), "edges": edges, "values": values})
            if len(values or ()) >= 2:
                parts[-1] |= dict(zip(("low", "high", "kind"), interval(values), strict=True), mean=mean(values))
        verdict = "not testable here" if "not_testable" in claim else None
        verdict = verdict or ("not run" if any(part["n"] < 8 for part in parts) else "")
        if not verdict:
            for part in parts:
                part["p"] = [
                    p_value(part["values"], edge, 2 if len(part["edges"]) == 1 else 1) for edge in part["edges"]
                ]
                every.append(part)
        found.append([claim["text"], verdict, parts])
    adjusted = holm([p for part in every for p in part["p"]])
    for part in every:
        part["adjusted"], adjusted = adjusted[: len(part["p"])], adjusted[len(part["p"]) :]
        away = [p <= 0.05 for p in part["adjusted"]]
        good = [part["mean"] > part["edges"][0], part["mean"] < part["edges"][-1]][: len(away)]
        wrong = any(a and not g for a, g in zip(away, good, strict=True))
        part["verdict"] = "opposite" if wrong else "holds" if all(away) else "inconclusive"
    for claim in found:
        own = [part.get("verdict") for part in claim[2]]
        claim[1] = claim[1] or (
            "opposite" if "opposite" in own else "holds" if set(own) == {"holds"} else "inconclusive"
        )
    return found
