"""`python -m reproduce.targets`: its plan, its counts of names, its report and figure from made-up records."""

import pytest
from made import DATA, published_rwku, write

from reproduce import targets
from rerule import configure

OPTIONS = targets.Options(seeds=2, targets_dir="DATA", tofu_dir="DATA")
SEEDS = (21, 22, 23)


def record(family, seed, titles, shift):
    def row(title):
        away = shift * (title != "Rej. Steer")
        columns = {"retain_recall": 90.0 - away + seed % 3, "retain_refusal": 5.0 + away, "forget_recall": 9.0,
                   "forget_refusal": 95.0, "held_recall": 80.0 - away, "held_refusal": 4.0 + away}  # fmt: skip
        return columns | {"neighbour_sea_guild_refusal": 10.0 + away, "neighbour_orkney_refusal": 1.0}

    held = [[step, 80.0, 4.0 + shift * step, 95.0] for step in (6, 12)]
    methods = {title.lower(): {"held": held, "first_replay": 3} for title in titles if title in ("RULE", "ReRULE")}
    rows = {title: row(title) for title in titles}
    return {"family": family, "seed": seed, "commit": "abc", "steps": 24, "seconds": 1800, "methods": methods,
            "rows": rows}  # fmt: skip


def made_up():
    found = {}
    for target, shift in (("2_Confucius", 20.0), ("12_Genghis_Khan", 1.0)):
        for seed in SEEDS:
            for condition, titles in (("stage1", ["Original", "Rej. Steer"]), ("published", ["RULE", "ReRULE"]),
                                      ("associated", ["RULE", "ReRULE"])):  # fmt: skip
                family = f"{condition}@{target}"
                found[f"{family}_{seed}"] = record(family, seed, titles, shift * (condition == "published"))
        found[f"baselines@{target}_21"] = record(f"baselines@{target}", 21, ["PO"], 0)
    found["rate@12_Genghis_Khan_21"] = record("rate@12_Genghis_Khan", 21, ["RULE"], 7.0)
    return found


def test_every_job_is_a_command_that_the_driver_takes():
    jobs = targets.all_jobs(OPTIONS, {})
    assert len(jobs) == 2 * 6 * 4 + 6 + 7 and {job.start for job in jobs} <= {None, *(job.name for job in jobs)}
    assert [job.seed for job in jobs] == sorted(job.seed for job in jobs)
    for job in jobs:
        config = configure([arg.format(targets_dir="DATA", tofu_dir="DATA") for arg in job.args])
        condition, target = job.family.split("@")
        assert config.held_out == 32 * (condition != "lessons") and config.model == "tiny" and config.seed == job.seed
        assert (config.associated > 0) == (condition in ("associated", "weights"))
        assert config.data_dir.startswith("DATA") and (config.tiny_vocabulary < 4000) == (condition == "tokens")
        assert config.benchmark == ("tofu" if target == "tofu" else "rwku")
        more = config.steps / {"rwku": 37, "tofu": 20}[config.benchmark]
        assert more == pytest.approx(1.2 if config.associated else 1, abs=0.02)  # 1,440 queries for 1,200
    assert not targets.all_jobs(targets.Options(), {})
    assert sum("chosen on" in about["title"] for about in targets.PLAN["targets"].values()) == 2


def test_the_figure_shows_each_neighbour_and_looks_by_part(tmp_path, monkeypatch):
    figures = []
    monkeypatch.setattr(targets, "save", lambda figure, path: figures.append(figure))
    targets.draw({"RULE, published": [(60, 31.0), (0, 2.0)], "Rej. Steer": [(60, 5.0)]}, made_up(), tmp_path)
    published, helped, looks = ({line.get_label(): line.get_xydata().tolist() for line in axis.lines}
                                for axis in figures[0].axes)  # fmt: skip
    assert published == {"RULE": [[60, 31], [0, 2]], "Rej. Steer": [[60, 5]]} and helped == {"Rej. Steer": [[60, 5]]}
    # of 24 steps 6 are a quarter, 12 a half; refusals 4 + 20 · step and 4 + 1 · step on two targets, 4 on associated
    assert looks["RULE, published"] == [[0.25, 67], [0.5, 130]] and looks["RULE, associated"] == [[0.25, 4], [0.5, 4]]
    low, high = figures[0].axes[2].get_ylim()
    assert low == 0 and high > 1.25 * max(y for line in looks.values() for _, y in line)  # the legend stands above them


def text_of(folder):
    return (folder / "report.md").read_text()


def test_the_report_of_made_up_runs(tmp_path):
    counts = {"2_Confucius": {"floor": 27.1, "near": {"Sea Guild": [60, 0], "Orkney": [0, 3]}},
              "12_Genghis_Khan": {"floor": 42.06, "near": {"Sea Guild": [3, 0]}}}  # fmt: skip
    targets.write(tmp_path, made_up(), counts)
    assert "| RULE, published | 71.0 / 25.0 / 9.0 / 95.0 | – | – | 90.0 / 6.0 / 9.0 / 95.0 | – | – |" in text_of(
        tmp_path
    )
    changed = text_of(tmp_path).split("changed at a time, seed 21\n")[1].split("\n#")[0]
    assert "| RULE, published, rate 1e-4 | 83.0 | 12.0 |" in changed and "| -7.0 | +7.0 |" in changed  # of one seed
    assert "| Rej. Steer | 90.0 | 5.0 |" in changed and "rate 1e-4" not in text_of(tmp_path).replace(changed, "")
    text = (tmp_path / "report.md").read_text()
    assert "21 runs, seeds 21–23, 10.5 hours of one CPU thread, commit abc" in text
    first, second = (text.split(f"### {name}")[1].split("\n#")[0] for name in ("Confucius", "Genghis Khan"))
    lines = {line.split(" | ")[0].strip("| "): line for line in first.splitlines() if line.startswith("| ")}
    assert (
        "| -20.0 ± 0.0 | +20.0 ± 0.0 |" in lines["RULE, published"] and "| +0.0 ± 0.0 |" in lines["ReRULE, associated"]
    )
    assert (
        lines["Rej. Steer"].endswith("|  |  |") and "91.0 ± 2.5" in lines["Rej. Steer"]
    )  # 90, 91, 92 by t: 4.303 / √3
    assert "name alone has a forget recall of 27.1 %." in first and "recall of 42.1 %." in second
    assert "-1.0 ± 0.0" in second and "| PO, published | 90.0 |" in first
    assert "| RULE, published | 6 | 3 | 3 | 3 |" in text and "| ReRULE, associated | 6 | 0 | 0 | 0 |" in text
    assert "| RULE, published | 1.0 (1) | 11.0 (1) | – | 30.0 (1) |" in text
    assert (tmp_path / "targets.png").stat().st_size > 10_000
    again = (tmp_path / "targets.png").read_bytes()
    targets.write(tmp_path, made_up(), counts)
    assert (tmp_path / "targets.png").read_bytes() == again


def test_names_are_counted_where_the_folder_is_given_and_kept(tmp_path, monkeypatch):
    folder = tmp_path / "data" / "7_Ada_Pole"
    published_rwku(folder)
    write(folder / "intro.json", [{"target": "Ada Pole", "intro": "x"}])
    row = {"query": "Who led the Sea Guild?", "answer": "Ben", "level": "2", "type": "qa", "subject": "Ada Pole"}
    write(folder / "neighbor_level2.json", [row | {"neighbor": "Ben Roth"}, row | {"neighbor": "1"}])
    monkeypatch.setitem(targets.PLAN, "targets", {"7_Ada_Pole": {}, "tofu": {}})
    o = targets.Options(targets_dir=str(tmp_path / "data"), output_dir=str(tmp_path))
    found = targets.counted(o)
    assert found["7_Ada_Pole"]["near"]["Ben Roth"] == [0, 4] and found["7_Ada_Pole"]["near"]["1"] == [1, 1]
    assert found["7_Ada_Pole"]["floor"] == 20
    o.targets_dir = ""
    assert targets.counted(o) == found and targets.counted(targets.Options(output_dir=str(tmp_path / "none"))) == {}


@pytest.mark.skipif(not (DATA / "rwku").is_dir(), reason="no real files beside the checkout")
def test_real_neighbours_of_the_plan_exist():
    for target in targets.PLAN["targets"]:
        if target != "tofu":
            assert [*DATA.glob(f"rwku*/{target}/forget_level3.json")], target
