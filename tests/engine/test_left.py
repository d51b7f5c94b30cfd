"""What a run leaves for others: cards, settings with where they come from, tables, modes, tokenizers."""

import json
import os
import re
from dataclasses import replace

import miniature
import pytest
from huggingface_hub import ModelCard, ModelCardData
from transformers import AutoModelForCausalLM, AutoTokenizer, pipeline

import benchmarks
import rerule
from benchmarks import tofu
from benchmarks.tiny import chat_template, text_tokenizer
from data import Prompt, encode_answer, encode_pair, encode_prompt
from engine.report import write_card


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder, before = tmp_path_factory.mktemp("left") / "run", os.umask(0o027)
    try:
        miniature.main("--output_dir", folder)
    finally:
        os.umask(before)
    return folder


def test_files_have_the_modes_that_the_umask_asks_for(run):
    modes = {path: path.stat().st_mode & 0o777 for path in run.rglob("*") if path.is_file()}
    assert set(modes.values()) == {0o640} and any(path.suffix == ".safetensors" for path in modes)


def test_a_card_has_the_hubs_header_and_the_scores(run):
    table = json.loads((run / "table.json").read_text())
    for phase, title in (("original", "Original"), ("rej_steer", "Rej. Steer"), ("rerule", "ReRULE")):
        card = ModelCard.load(run / phase / "README.md")
        data = card.data
        assert isinstance(data, ModelCardData) and data.library_name == "transformers" and data.license == "mit"
        assert data.pipeline_tag == "text-generation" and data.base_model is None and "rerule" in data.tags
        scores = {result.metric_type: result.metric_value for result in data.eval_results}
        assert scores == {name: table[title][name] for name in ("forget_recall", "retain_recall")}
        assert "## Limits" in card.text and "Prompts" in card.text


def test_a_card_of_a_given_model_names_it_and_the_data_and_claims_no_licence(run, tmp_path):
    config = rerule.configure(["--benchmark", "builtin"])
    config = replace(config, benchmark="tofu", model="some/model")

    def card(config, scores):
        write_card(tmp_path, "rule", config, scores)
        return ModelCard.load(tmp_path / "README.md").data

    data = card(config, {"model_utility": 0.5})
    assert (data.base_model, data.datasets, data.license) == ("some/model", "locuslab/TOFU", "other")
    assert data.eval_results[0].metric_value == 0.5 and data.eval_results[0].dataset_type == "locuslab/TOFU"
    assert card(config, {}).eval_results is None
    assert card(replace(config, model=str(run)), {}).base_model is None


def test_settings_say_where_they_come_from_and_are_a_command_again(run):
    stored = json.loads((run / "config.json").read_text())
    (start,) = stored["starts"]
    assert set(start) == {"command", "commit", "versions", "device", "date"} and start["device"] == "cpu"
    assert rerule.configure([str(run / "config.json")]).steps == 7


def test_a_resumed_run_adds_its_start(tmp_path):
    assert miniature.start(["--output_dir", tmp_path / "run"], ("rule", 3)) == -9
    miniature.main("--output_dir", tmp_path / "run", "--resume")
    assert len(json.loads((tmp_path / "run" / "config.json").read_text())["starts"]) == 2


def test_every_row_of_the_log_has_the_time_of_day(run):
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert all(re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\+00:00", row["time"]) for row in rows)


def test_every_saved_model_writes_text_with_the_libraries_alone(run):
    for folder in ("original", "retained", "rej_steer", "rule", "rerule"):
        model, tokenizer = (kind.from_pretrained(run / folder) for kind in (AutoModelForCausalLM, AutoTokenizer))
        assert tokenizer.model_max_length == model.config.max_position_embeddings < 1000
        write = pipeline("text-generation", str(run / folder))
        (said,) = write([{"role": "user", "content": "Where?"}], max_new_tokens=3, do_sample=False)
        assert said["generated_text"][-1]["role"] == "assistant"


def test_a_template_gives_the_ids_of_raw_prompts_or_is_none():
    prompts = [tofu.inst("Who is Ada Pole?"), tofu.inst("Where was Ada born?")]
    plain, chat = (text_tokenizer([p.plain for p in prompts] + ["In Arle."], 300) for _ in range(2))
    chat.chat_template = chat_template(prompts)
    assert chat.chat_template == "[INST] {{ messages[-1]['content'] }} [/INST]"
    for prompt in prompts:
        for encode in (
            encode_prompt,
            lambda t, p: encode_answer(t, p, "In Arle."),
            lambda t, p: encode_pair(t, p, "x"),
        ):
            assert encode(plain, prompt) == encode(chat, prompt)
    rwku = benchmarks.ALL["rwku"].wordings
    assert chat_template(rwku(type("Q", (), {"question": "Who?"}))) is None
    assert chat_template([Prompt(None, "raw")]) == "{{ messages[-1]['content'] }}"
