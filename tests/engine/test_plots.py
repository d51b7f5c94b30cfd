"""Pictures: what is drawn, by hand, and that names stand beside their points."""

import json
import subprocess
import sys
from pathlib import Path

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


CROWD = {f"method {n}": (20 + 3 * (n % 4), 80 + 3 * (n // 4), [(20, 79)], n == 3) for n in range(12)}
POINTS = CROWD | {"Original": (100, 100, [], None), "Rej. Steer": (0, 40, [], None), "RULE": (0, 90, [], None),
                  "ReRULE": (0, 91, [], None)}  # fmt: skip


def test_scatter_has_one_colour_for_each_method(tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(plots, "save", lambda figure, path: drawn.append(figure))
    plots.scatter(POINTS, tmp_path / "scatter.png")
    axis = drawn[0].axes[0]
    handles, labels = axis.get_legend_handles_labels()
    colour = {label: tuple(handle.get_edgecolors()[0]) for handle, label in zip(handles, labels, strict=True)}
    from matplotlib.colors import to_rgba

    assert colour["RULE"] == to_rgba(plots.COLOURS["rule"]) and colour["ReRULE"] == to_rgba(plots.COLOURS["rerule"])
    assert len(set(colour.values())) == len(colour) == 5
    assert axis.get_legend().get_title().get_text() == "small dots are seeds; open: stopped early"


def test_names_cover_neither_points_nor_one_another(tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(plots, "save", lambda figure, path: drawn.append(figure))
    plots.scatter(POINTS, tmp_path / "scatter.png")
    (axis,) = drawn[0].axes
    drawn[0].canvas.draw()
    names = {text.get_text(): text.get_window_extent().shrunk(0.98, 0.7) for text in axis.texts if text.get_text()}
    assert set(names) == set(POINTS)
    boxes = list(names.values())
    assert not any(a.overlaps(b) for i, a in enumerate(boxes) for b in boxes[:i])
    centres = axis.transData.transform([point[:2] for point in POINTS.values()])
    assert not any(box.contains(*centre) for box in boxes for centre in centres)
