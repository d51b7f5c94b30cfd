"""Pictures: what is drawn, by hand; one colour a method, sorted rows, numbers that are the means."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from matplotlib.colors import to_rgba
from PIL import Image

from engine import plots

ROOT = Path(__file__).resolve().parents[2]


def test_matplotlib_is_imported_only_to_draw():
    code = "import engine.plots, sys; assert not {'matplotlib', 'torch', 'PIL'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


def test_smoothing_is_a_centred_mean_of_what_is_there():
    assert plots.smooth([1, 2, 3, 4, 5]) == [2, 2.5, 3, 3.5, 4]
    assert plots.smooth([1, None, 3], width=3) == [1, 2, 3]
    assert plots.smooth([None, None], width=1) == [None, None]


def test_hard_prompts_are_told_apart_before_replay():
    rows = [{"step": 1, "query": 0, "rewards": [0, 0]}, {"step": 2, "query": 0, "rewards": [1, 0]},
            {"step": 1, "query": 1, "rewards": [1, 0]}, {"step": 3, "query": 1, "rewards": [0, 0]},
            {"step": 3, "query": 2, "rewards": [0, 0]}]  # fmt: skip
    assert plots.hard_prompts(rows, 3, 0.5) == ({0}, {1})  # r̄ of 1/4 and 1/2; the third is first asked too late
    assert plots.hard_prompts(rows, 4, 0.5) == ({0, 1, 2}, set())


def write_run(folder, first_replay):
    """The logs of four steps of both methods on two prompts."""
    rows, samples = [], []
    for method in ("rej_steer", "rule", "rerule"):
        for step in range(1, 5):
            row = {"method": method, "step": step, "reward_forget": 0.5 + step / 10, "reward_boundary": None}
            replayed = {"replay_groups": 2} if method == "rerule" and step >= first_replay else {}
            rows.append(
                row | replayed | ({"eval_retain_recall": 9.0 * step, "eval_forget_recall": 1.0} if step % 2 else {})
            )
            samples += [{"method": method, "step": step, "query": q, "rewards": [q, 1]} for q in (0, 1)]
    for name, values in (("metrics", rows), ("samples", samples)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(value) + "\n" for value in values))
    (folder / "config.json").write_text('{"tau": 0.6}')
    return rows, samples


def test_lines_of_a_run(tmp_path):
    rows, samples = write_run(tmp_path, 3)
    own = [[row for row in part if row["method"] == "rule"] for part in (rows, samples)]
    lines = plots.lines_of(*own, *plots.hard_prompts(own[1], 3, 0.6))
    assert lines["hard"] == [0.5] * 4 and lines["easy"] == [1] * 4
    assert lines["forget"] == [0.6, 0.7, 0.8, 0.9] and lines["boundary"] == [None] * 4
    assert lines["retain ↑"] == [9, None, 27, None] and lines["forget ↓"] == [1, None, 1, None]


def test_curves_are_drawn_and_are_the_same_again(tmp_path):
    write_run(tmp_path, 3)
    plots.curves(tmp_path)
    first = (tmp_path / "curves.png").read_bytes()
    plots.curves(tmp_path)
    assert (tmp_path / "curves.png").read_bytes() == first and first[:4] == b"\x89PNG"
    assert len(list(tmp_path.glob("*.png"))) == 1


def test_a_run_of_baselines_alone_has_no_curves(tmp_path):
    write_run(tmp_path, 3)
    (tmp_path / "metrics.jsonl").write_text('{"method": "ga", "step": 1}\n')
    plots.curves(tmp_path)
    assert not (tmp_path / "curves.png").exists()


def test_the_start_of_replay_is_the_median_over_runs():
    axis = plots.pyplot().figure().subplots()
    plots.mark_start(axis, [None])
    assert not axis.lines and not axis.patches
    plots.mark_start(axis, [5])
    assert list(axis.lines[0].get_xdata()) == [4.5, 4.5] and not axis.patches
    plots.mark_start(axis, [11, None, 15, 12, 11])
    assert list(axis.lines[1].get_xdata()) == [11, 11] and len(axis.patches) == 1


def test_every_method_has_a_look_of_its_own():
    assert plots.look("RULE") == plots.look("rule") == plots.look("RULE, longer")
    assert plots.look("Rej. Steer") == plots.look("rej_steer") and plots.look("GA+GDR (GD)") == plots.look("other")
    colours, markers, _ = zip(*plots.LOOKS.values(), strict=True)
    assert len(set(markers)) == len(markers)  # told apart without colour
    assert len(set(colours)) == len(colours) - 1 and plots.look("original")["color"] == plots.look("retained")["color"]


@pytest.fixture
def drawn(monkeypatch):
    """The figures that would have been saved."""
    figures = []
    monkeypatch.setattr(plots, "save", lambda figure, path: figures.append(figure))
    return figures


def marks(axis):
    """{row from the top: (x, colour, marker)} of the means."""
    large = [line for line in axis.lines if line.get_markersize() == 8]
    last = len(axis.get_yticks()) - 1
    return {last - round(line.get_ydata()[0]): (line.get_xdata()[0], to_rgba(line.get_color()), line.get_marker())
            for line in large}  # fmt: skip


def test_rows_of_dots_have_mean_interval_seeds_and_number():
    axis = plots.pyplot().figure().subplots()
    stat = {"mean": -2.04, "low": -3.0, "high": 1.0, "values": [-3.0, -1.08]}
    plots.dots(axis, [("upper", "RULE", stat), ("lower", "random", None)], "{mean:+.1f}")
    assert [label.get_text() for label in axis.get_yticklabels()] == ["lower", "upper"]
    assert {text.xy[1]: text.get_text() for text in axis.texts} == {1: "−2.0", 0: "–"}
    assert marks(axis) == {0: (-2.04, to_rgba("#0072B2"), "o")}
    assert [list(line.get_xdata()) for line in axis.lines] == [[-3.0], [-1.08], [-3.0, 1.0], [-2.04]]


def test_methods_are_sorted_by_what_they_keep_and_forget(tmp_path, drawn):
    row = lambda forget, retain, **more: {"forget_recall": forget, "retain_recall": retain, **more}  # noqa: E731
    rows = {"Original": [row(100.0, 100.0, leak_64=99.0)], "GA": [row(30.0, 60.0, stopped="NaN"), row(10.0, 80.0)],
            "RULE": [row(0.0, 75.0, leak_64=40.0)], "ReRULE": [row(0.0, 90.0, leak_64=45.0)],
            "WHP": [row(5.0, None)]}  # fmt: skip
    plots.scatter(rows, tmp_path / "methods.png")
    axes = drawn[0].axes
    # 2ab / (a + b): ReRULE 94.7 (100, 90), RULE 85.7 (100, 75), GA 74.7 (80, 70), Original 0
    assert [label.get_text() for label in axes[0].get_yticklabels()] == ["Original", "GA†", "RULE", "ReRULE"]
    numbers = [[text.get_text() for text in sorted(axis.texts, key=lambda text: -text.xy[1])] for axis in axes]
    assert numbers == [
        ["0.0", "0.0", "20.0", "100.0"],
        ["90.0", "75.0", "70.0", "100.0"],
        ["45.0", "40.0", "–", "99.0"],
    ]
    found = marks(axes[1])
    assert [found[at][0] for at in range(4)] == [90, 75, 70, 100]
    assert [found[at][1] for at in range(4)] == [to_rgba(c) for c in ("#D55E00", "#0072B2", plots.GREY, "black")]


def test_methods_without_sampled_leakage_have_two_panels(tmp_path, drawn):
    plots.scatter({"RULE": [{"forget_recall": 0.0, "retain_recall": 75.0}]}, tmp_path / "methods.png")
    assert len(drawn[0].axes) == 2
    row = {"forget_recall": 0.0, "retain_recall": 75.0}
    most = {"RULE": [row | {"leak_64": 40.0}], "GA": [row], "PO": [row]}
    plots.scatter(most, tmp_path / "methods.png")
    assert len(drawn[1].axes) == 2  # a third panel would be empty for most


def test_curves_have_the_methods_colours_and_last_values(tmp_path, drawn):
    write_run(tmp_path, 3)
    plots.curves(tmp_path)
    told = [[text.get_text() for text in axis.get_legend().get_texts()] for axis in drawn[0].axes]
    # the reward's last three steps, 0.7, 0.8 and 0.9; r̄ of the two prompts, 1/2 and 1; recall at step 3
    assert told[0] == ["RULE, forget: 0.80", "ReRULE, forget: 0.80"]
    assert told[1] == [f"{name}, {part}" for name in ("RULE", "ReRULE") for part in ("easy: 1.00", "hard: 0.50")]
    assert told[2][:2] == ["RULE, retain ↑: 27.0", "RULE, forget ↓: 1.0"]
    for axis in drawn[0].axes:
        for line in axis.lines:
            name = line.get_label().split(",")[0]
            assert name not in ("RULE", "ReRULE") or line.get_color() == plots.look(name)["color"]


def test_queries_held_out_have_a_panel_of_their_own(tmp_path, drawn):
    write_run(tmp_path, 3)
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    for row in rows:
        row |= {"held_recall": 80.0, "held_refusal": 5.0 + row["step"]} if row["step"] in (1, 3) else {}
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    plots.curves(tmp_path)
    (axis,) = [axis for axis in drawn[0].axes if axis.get_title() == "Queries held out of training"]
    told = [text.get_text() for text in axis.get_legend().get_texts()]
    assert told[:2] == ["RULE, recall ↑: 80.0", "RULE, refusals ↓: 8.0"]
    assert [list(line.get_xdata()) for line in axis.lines[:2]] == [[1, 3]] * 2


def test_pictures_are_sharp(tmp_path):
    figure = plots.pyplot().figure(figsize=(2, 1))
    plots.save(figure, tmp_path / "p.png")
    with Image.open(tmp_path / "p.png") as picture:
        assert picture.size == (400, 200) and round(picture.info["dpi"][0]) == 200 and picture.mode == "P"
