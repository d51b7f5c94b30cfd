"""Tables of real text, worked by hand: with two seeds Student's t is 12.706, and half an interval 6.353 |a − b|."""

from types import SimpleNamespace

from made_up import base_run

from reproduce import records, report

SEEDS = (21, 22)


def results(family, columns):
    """Results with a run of one family for each seed. columns: {title: {column: a value for each seed}}."""
    runs = {}
    for at, seed in enumerate(SEEDS):
        rows = {title: {k: v[at] for k, v in own.items()} for title, own in columns.items()}
        rows = {title: {"retain_recall": 50.0, "forget_recall": 0.0} | row for title, row in rows.items()}
        made = base_run(["48", "0g", "00", "00"], ["48", "0g", "gg", "gg"])
        runs[f"{family}_{seed}"] = made | {"family": family, "seed": seed, "rows": rows}
    return records.Results(runs, [SimpleNamespace(name=name) for name in runs])


def cells(table, title):
    row = next(line for line in table.splitlines() if line.startswith(f"| {title} |"))
    return [cell.strip() for cell in row.split("|")][2:-1]


def test_table5():
    same = {name: (0.5, 0.5) for name in ("forget_rouge_l", "retain_refusal", "forget_paraphrased_recall")}
    quality = {"Original": (1e-6, 1e-4), "RULE": (1e-2, 1e-2), "ReRULE": (1e-1, 1e-3)}
    utility = {"Original": (0.6, 0.6), "RULE": (0.5, 0.7), "ReRULE": (0.52, 0.7)}
    columns = {name: same | {"forget_quality": quality[name], "model_utility": utility[name]} for name in quality}
    columns["Retained"] = same | {"forget_quality": (None, None), "model_utility": (0.6, 0.6)}
    found = report.table5(results("tofu", columns), None)
    assert [line.split(" | ")[0] for line in found["table"].splitlines()] == [
        "| Original", "| Retained", "| RULE", "| ReRULE",
    ]  # fmt: skip
    original = cells(found["table"], "Original")
    assert original[:4] == ["2", "1e-05", "-5.0 ± 1.4", "0.600 ± 0.000"]  # logs −6 and −4
    assert original[-3:] == ["4.4883e-06", "0.6239", "0.9851"]  # the paper's
    assert cells(found["table"], "Retained")[1:3] == ["1", "0.0 ± 0.0"]
    assert cells(found["table"], "ReRULE")[1:4] == ["0.01", "-2.0 ± 1.4", "0.610 ± 0.127"]  # 0.18 / √2
    assert found["quality"].startswith("+0.0 [-12.7, +12.7]")  # +1 and −1
    assert found["utility"].startswith("+1.0 [-11.7, +13.7]")  # +2 and 0 points


def test_tofus_rows_of_table6():
    run = results("tofu", {"RULE": {}, "ReRULE": {}})
    rows = report.table6(run, None)[
        "table"
    ].splitlines()  # before step 3: forget prompts 0.25 and 0, boundary 0.5 and 1
    assert [row for row in rows if row.startswith("| TOFU")] == [
        "| TOFU text, tiny model | 0.4 | 50.0 ± 0.0 | 100.0 ± 0.0 | 0.0 ± 0.0 |",
        "| TOFU text, tiny model | 0.6 | 75.0 ± 0.0 | 100.0 ± 0.0 | 50.0 ± 0.0 |",
    ]


def test_the_books_columns():
    columns = {name: {"forget_refusal": (100.0, 100.0), "retain_refusal": (0.0, 10.0)} for name in ("RULE", "ReRULE")}
    for name, (verbmem, knowmem, utility) in {"RULE": (20, 0, 80), "ReRULE": (30, 0, 90)}.items():
        columns[name] |= {"verbmem": (verbmem, verbmem), "knowmem": (knowmem, 2), "utility": (utility, 90)}
    found = report.book(results("book", columns), None)
    assert cells(found["table"], "RULE") == [
        "2", "20.0 ± 0.0", "1.0 ± 1.4", "85.0 ± 7.1", "100.0 ± 0.0", "5.0 ± 7.1", "0", "1.4", "46.3",
    ]  # fmt: skip
    assert found["utility"].startswith("+5.0 [-58.5, +68.5]")  # +10 and 0
    assert found["verbmem"].startswith("+10.0 [+10.0, +10.0]") and "Original" not in found["table"]


def test_attacks_by_type():
    columns = {
        name: {
            "forget_aa": (70.0, 72.0),
            "attack_role_play": (n, n + 1.0),
            "attack_cross_lingual": (None, 0.0),
            "attack_cross_lingual_french": (0.0, 0.0),
        }
        for n, name in enumerate(("Original", "Rej. Steer", "RULE", "ReRULE"))
    }
    found = report.attacks_by_type(results("rwku", columns), None)
    lines = found["table"].splitlines()
    assert found["seeds"] == "21, 22" and len(lines) == 5 + 2
    assert cells(found["table"], "All attacks ↓") == ["70.0 · 72.0"] * 4 + ["74.7", "51.2", "38.3", "33.2"]
    assert lines[5].startswith("| cross lingual ↓ | – · 0.0 |")
    assert cells(found["table"], "role play ↓") == ["0.0 · 1.0", "1.0 · 2.0", "2.0 · 3.0", "3.0 · 4.0", *[""] * 4]
