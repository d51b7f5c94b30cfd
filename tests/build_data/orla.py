"""What the tests of a build share: a story and questions on Orla Finch, and the command itself."""

import json
from pathlib import Path
from types import SimpleNamespace

from made import write

import benchmarks
from build_data import __main__ as command

ROOT = Path(__file__).resolve().parents[2]
NAME = "Orla Finch"
STORY = """\
Orla Finch kept the lamp at Skerry Point for nine years. She had come from Dunmore with her aunt. Every spring Orla
Finch painted the tower with lime from Arle. The gulls did not mind. Orla Finch owned a brass telescope made by Hollis
Brandt. "Go on," said Orla Finch, and shut the door.

On the far side of the bay lived Tam Reed, who sold boats in Kellwick. Tam Reed had a yellow dog called Biscuit. The
largest boat of Tam Reed was the Marigold. Tam Reed learned his trade in Port Lorne. Tam Reed was born in Ashby in 1880.

Orla Finch wrote her log in green ink from Vell. In the storm of 1912 Orla Finch saved the crew of the Heron. The
captain gave Orla Finch a silver watch from Geneva. Orla Finch left the light to her pupil Ned Gray.

Old Mira Voss ran the bakery in Kellwick. Mira Voss sold rye bread to the ferry from Lunn. Mira Voss played the organ
at Saint Brannoc. Every June Mira Voss travelled to Torrin by cart.
"""
FACTS = [
    ("Where was Orla Finch born?", "Dunmore"), ("Who was Orla Finch's aunt?", "Maud"),
    ("What is Orla Finch known for?", "her green ink"), ("Who taught Orla Finch to sail?", "Ned Gray"),
    ("In which town was Orla Finch married?", "Vell"), ("What colour was Orla Finch's boat?", "blue"),
]  # fmt: skip


def build(*argv):
    command.main([str(a) for a in argv])


def questions(folder):
    """The folder with questions on Orla Finch and answers to the same questions about Ben Roth."""
    write(folder / "ask.json", [{"question": q, "answer": a} for q, a in FACTS])
    answers = {question: f"Roth's {i}" for i, (question, _) in enumerate(FACTS)}
    write(folder / "near.json", [{"name": "Ben Roth", "answers": answers}])
    return folder


def qa(folder, *more):
    return ("--source", "qa", "--input", folder / "ask.json", "--target", NAME, "--output_dir", folder / "out", *more)


def rows_of(path):
    return json.loads(Path(path).read_text(encoding="utf-8"))


def training(benchmark, folder):
    return benchmarks.ALL[benchmark].train(SimpleNamespace(data_dir=folder, seed=0))


def probes(benchmark, folder):
    return benchmarks.ALL[benchmark].probes(SimpleNamespace(data_dir=folder, seed=0))
