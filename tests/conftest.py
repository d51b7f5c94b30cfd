"""Tiny models, rollout groups and a naive computation of both, for tests in every folder."""

import gc
import json
import os
import shutil
import sys
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "passive")
os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch: tests run on all cores already
os.environ.setdefault("HF_HUB_OFFLINE", "1")
sys.path[:0] = [
    str(Path(__file__).parent / name) for name in ("..", ".", "scale", "robust", "build_data")
]  # modules; what tests share

import attacked  # noqa: E402
import miniature  # noqa: E402
import pytest  # noqa: E402
import torch  # noqa: E402
from made import TRAIN, byte_tokenizer, make_model, tree  # noqa: E402
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM  # noqa: E402

import grpo  # noqa: E402
import rerule  # noqa: E402
from benchmarks import tiny as tiny_models  # noqa: E402
from benchmarks.tiny import word_tokenizer  # noqa: E402
from config import InputError  # noqa: E402

gc.freeze()  # modules and their code are no garbage to look for whenever a model is loaded
SIZES = dict(bos_token_id=1, eos_token_id=2, pad_token_id=0)
PROMPTS = ((3, 4), (5, 6, 7, 8, 9))


def pytest_collection_modifyitems(items):
    """The longest files first, so that no process waits for one at the end; xdist's own order is by number of tests."""
    longest = ["test_rerule.py", "test_ranks.py", "test_walkthrough.py", "test_train.py", "test_commands.py"]
    items.sort(key=lambda item: longest.index(item.path.name) if item.path.name in longest else len(longest))


def tiny(architecture, vocab=40):
    torch.manual_seed(0)
    if architecture == "gpt2":
        config = GPT2Config(
            vocab_size=vocab, n_embd=16, n_layer=2, n_head=2, n_positions=64, initializer_range=0.3, **SIZES
        )
        return GPT2LMHeadModel(config).eval()
    kinds = {"llama": (LlamaConfig, LlamaForCausalLM, 2), "qwen2": (Qwen2Config, Qwen2ForCausalLM, 1)}
    config_of, model_of, kv_heads = kinds[architecture]
    config = config_of(
        vocab_size=vocab, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=kv_heads, max_position_embeddings=64, initializer_range=0.3, **SIZES,
    )  # fmt: skip
    return model_of(config).eval()


@pytest.fixture(scope="session")
def early(tmp_path_factory):
    """Flags that take the miniature's models before Stage 2 from a run that is made once."""
    folder = tmp_path_factory.mktemp("early") / "run"
    miniature.main("--output_dir", folder, "--method", "rej_steer")
    return "--start_from", folder


@pytest.fixture(params=["llama", "qwen2", "gpt2"])
def any_model(request):
    """A random model of each architecture, sharp enough (init 0.3) that a wrong position or mask shows."""
    return tiny(request.param)


@pytest.fixture
def model():
    return tiny("llama")


@pytest.fixture
def words():
    """A whole-word tokenizer that puts BOS before every text."""
    return word_tokenizer(["a b c d e f g h who where is was the cat dog ? [INST] [/INST] I don't know that."])


def drawing(n_responses, rng):
    """draw() of a sampler, in which a seed stands for a generator: a number for each response, and one to spare."""
    rng = torch.Generator().manual_seed(rng) if isinstance(rng, int) else rng
    return lambda: torch.rand(n_responses + 1, dtype=torch.double, generator=rng)


def make_groups(
    model, prompts=PROMPTS, temperature=1.0, seed=0, group_size=3, max_new=6, stops=(2,), sample=grpo.sample
):  # fmt: skip
    """Groups sampled from the model, with random rewards."""
    rng = torch.Generator().manual_seed(seed)
    draw = drawing(len(prompts) * group_size, rng)
    ids, mask, old = sample(model, prompts, group_size, max_new, list(stops), temperature, draw)
    rewards = torch.rand(len(prompts), group_size, generator=rng)
    advantages = grpo.group_advantages(rewards)
    return [
        grpo.RolloutGroup(n, 1, torch.tensor(p), ids[n], mask[n], old[n], None, rewards[n], advantages[n])
        for n, p in enumerate(prompts)
    ]


def naive_logprobs(model, prompt, response, temperature):
    """One unpadded row at a time, one full forward, a Python loop over tokens."""
    logits = model(torch.tensor([list(prompt) + list(response)])).logits[0]
    out = []
    for t, token in enumerate(response):
        row = logits[len(prompt) + t - 1] / temperature
        out.append(row[token] - torch.logsumexp(row, 0))
    return torch.stack(out)


def naive_loss(model, groups, loss_norm, kl_coef):
    """Eq. 3 and β KL by one row at a time. Returns: loss with its graph; the sum of k3 over tokens."""
    n_responses, n_tokens = sum(len(g.rewards) for g in groups), sum(int(g.mask.sum()) for g in groups)
    total, kl = 0.0, 0.0
    for group in groups:
        for i in range(len(group.mask)):
            tokens = group.response_ids[i][group.mask[i]].tolist()
            log_p = naive_logprobs(model, group.prompt_ids.tolist(), tokens, 1.0)
            delta = group.ref_logprobs[i][group.mask[i]] - log_p
            k3 = delta.exp() - delta - 1
            per_token = -group.advantages[i] * (log_p - log_p.detach() + 1) + kl_coef * k3
            weights = {"sequence": 1 / n_responses / len(tokens), "token": 1 / n_tokens, "sum": 1 / n_responses}
            total, kl = total + weights[loss_norm] * per_token.sum(), kl + k3.sum().item()
    return total, kl


# --- mistakes of the user's ------------------------------------------------------------------------------------------


@pytest.fixture
def forbid(monkeypatch):
    """Make functions of the driver fail the test when they are called."""

    def forbid(*names):
        for name in names:

            def called(*args, name=name, **kwargs):
                pytest.fail(f"{name} ran before the mistake was told")

            monkeypatch.setattr(rerule, name, called)

    return forbid


@pytest.fixture
def refused(tmp_path, monkeypatch, forbid):
    """Run the driver on a mistake; returns its line once it is sure that nothing was written and nothing trained."""
    forbid("stage1", "stage2", "evaluate")
    monkeypatch.setattr(tiny_models, "fit", lambda *_, **__: pytest.fail("fit ran before the mistake was told"))

    def refused(*argv, output="run"):
        where = ["--output_dir", tmp_path / output] if output else []
        monkeypatch.chdir(tmp_path)
        before = tree(tmp_path)
        with pytest.raises(InputError) as error:
            miniature.driver(*argv, *where)
        assert tree(tmp_path) == before
        message = str(error.value)
        assert message.strip() == message and len(message.splitlines()) == 1 and len(message) < 400
        return message

    return refused


@pytest.fixture
def folders(tmp_path):
    """The files of each benchmark."""
    return {name: make(tmp_path / name) for name, make in TRAIN.items()}


@pytest.fixture(scope="session")
def saved(tmp_path_factory):
    """Models in folders: a good one, one of 16 positions, some broken ones."""
    place = tmp_path_factory.mktemp("models")
    make_model(context=2048).save_pretrained(place / "good")
    byte_tokenizer().save_pretrained(place / "good")
    words = word_tokenizer(["[INST] What did Orla do? [/INST] Question: Answer: " + " ".join("abcdefghij")])
    tiny_models.tiny_llama(words, 0, 16, 1, 16).save_pretrained(place / "short")
    words.save_pretrained(place / "short")

    def broken(name, change):
        shutil.copytree(place / "good", place / name)
        change(place / name)

    def edit(file, **changes):
        def change(folder):
            stored = json.loads((folder / file).read_text())
            stored = {key: value for key, value in (stored | changes).items() if value is not None}
            (folder / file).write_text(json.dumps(stored))

        return change

    broken("no eos", edit("tokenizer_config.json", eos_token=None))
    broken("no weights", lambda folder: (folder / "model.safetensors").unlink())
    broken("half the weights", lambda folder: os.truncate(folder / "model.safetensors", 5000))
    broken("a layer short", edit("config.json", num_hidden_layers=3))
    broken("another width", edit("config.json", hidden_size=64))
    broken("no type", edit("config.json", model_type=None, architectures=None))
    broken("no decoder", edit("config.json", model_type="vit"))
    broken("bad config", lambda folder: (folder / "config.json").write_text("{"))
    broken("bad tokenizer", lambda folder: (folder / "tokenizer.json").write_text("{}"))
    broken("small vocabulary", lambda folder: make_model(context=2048, vocab=200).save_pretrained(folder))
    (place / "empty").mkdir()
    (place / "file").write_text("no folder")
    return place


# --- runs that are attacked ------------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def finished(tmp_path_factory):
    """A short run that nobody disturbed."""
    folder = tmp_path_factory.mktemp("finished") / "run"
    assert attacked.ended(attacked.short, "--output_dir", folder).code == 0
    return folder


@pytest.fixture(scope="session")
def stopped(tmp_path_factory):
    """One that was interrupted in its third step of ReRULE, with a state of the second."""
    return attacked.interrupt(tmp_path_factory.mktemp("stopped") / "run")


@pytest.fixture
def interrupted(stopped, tmp_path):
    """A copy of it, to be spoilt."""
    return Path(shutil.copytree(stopped, tmp_path / "run"))
