"""Likelihoods against all patterns of hidden tokens, and the harness's own tasks on local files."""

import dataclasses
import itertools
import json
import math
import os
import signal
import subprocess
import sys
import time
import types

import jax
import numpy as np
import pytest
from conftest import ROOT, xla_flags

from mmada_jax.data import records
from mmada_jax.devices import sharding
from mmada_jax.measure import likelihood
from mmada_jax.nets import lora, transformer
from mmada_jax.tokens.tokenizer import chat
from tests.api_toys import untrained_model  # noqa: F401

pytest.importorskip("lm_eval", reason="needs the extra eval")


def log_probs(model, rows):
    """log p over the whole vocabulary, by hand, [B, L, V]."""
    seen_BL = np.stack([seen for seen in rows])
    h_BLD = transformer.hidden_states(model.params, model.config, seen_BL, seen_BL >= 0)
    logits = np.asarray(transformer.unembed(model.params, model.config, h_BLD), np.float64)
    return (
        logits
        - np.log(np.exp(logits - logits.max(-1, keepdims=True)).sum(-1, keepdims=True))
        - logits.max(-1, keepdims=True)
    )


def of_every_draw(model, pair):
    """The bound's value for each pattern of hidden tokens, by how many it hides: {x: [values]}."""
    tokens = np.array([*pair.context, *pair.continuation])
    start, L, values = len(pair.context), len(pair.continuation), {}
    for x in range(1, L + 1):
        rows, places = [], list(itertools.combinations(range(start, start + L), x))
        for hidden in places:
            row = tokens.copy()
            row[list(hidden)] = model.vocab.mask
            rows.append(row)
        logp = log_probs(model, rows)
        values[x] = [
            L / x * sum(logp[i, place, tokens[place]] for place in hidden)
            for i, hidden in enumerate(places)
        ]
    return values


def test_the_bound_is_that_of_all_patterns_within_its_standard_error(model):
    pair = likelihood.Pair(model.tokenizer.encode("what is 3 plus 4?"), model.tokenizer.encode("it is 7!"))
    values = of_every_draw(model, pair)
    L = len(pair.continuation)
    assert 4 <= L <= 8
    exact = np.mean([np.mean(of) for of in values.values()])
    estimates = [likelihood.log_likelihoods(model, [pair], 64, seed)[0] for seed in range(12)]
    error = np.std(estimates, ddof=1) / math.sqrt(len(estimates))
    assert error > 0
    assert abs(np.mean(estimates) - exact) < 3.5 * error


def test_one_token_is_exact(model):
    context = model.tokenizer.encode("what is 3 plus 4?")
    pairs = [likelihood.Pair(context, [token]) for token in (20, 30, 40)]
    got = likelihood.log_likelihoods(model, pairs, seed=5)
    want = log_probs(model, [np.array([*context, model.vocab.mask])])[0, -1, [20, 30, 40]]
    np.testing.assert_allclose(got, want, atol=1e-4)


def test_a_pair_does_not_depend_on_its_company(model):
    encode = model.tokenizer.encode
    pairs = [
        likelihood.Pair(encode("what is this?"), encode(text)) for text in ("seven", "a five", "7 + 12")
    ]
    told = []
    together = likelihood.log_likelihoods(
        model, pairs, draws=10, rows=8, progress=lambda number, value: told.append((number, value))
    )
    alone = [likelihood.log_likelihoods(model, [pair], draws=10, rows=16)[0] for pair in reversed(pairs)]
    np.testing.assert_allclose(together, alone[::-1], rtol=1e-5)
    assert told == list(enumerate(together))


@pytest.mark.parametrize(("length", "draws"), [(1, 1), (5, 128), (7, 3), (128, 128), (300, 128)])
def test_numbers_of_hidden_tokens_are_spread_evenly(length, draws):
    counts = np.zeros(length + 1)
    for seed in range(50):
        numbers = likelihood.hidden_numbers(length, draws, np.random.default_rng(seed))
        assert numbers.min() >= 1
        assert numbers.max() <= length
        each = np.bincount(numbers, minlength=length + 1)[1:]
        assert each.max() - each.min() <= 1 + (draws % length != 0)
        counts += np.bincount(numbers, minlength=length + 1)
    assert counts[0] == 0


def test_what_cannot_be_scored(model):
    with pytest.raises(ValueError, match="pair 1 has an empty"):
        likelihood.log_likelihoods(model, [likelihood.Pair([1], [2]), likelihood.Pair([1], [])])
    with pytest.raises(ValueError, match="pair 0 has 1001 tokens, the model takes 128"):
        likelihood.log_likelihoods(model, [likelihood.Pair([1], [2] * 1000)])


# ---- The harness ------------------------------------------------------------------------------------

GENERATES = """
task: sums_in_words
dataset_path: json
dataset_kwargs: {data_files: {test: FILE}}
output_type: generate_until
test_split: test
doc_to_text: "{{question}}"
doc_to_target: "{{answer}}"
generation_kwargs: {until: ["\\n", "zzz"], max_gen_toks: 12}
metric_list: [{metric: exact_match}]
"""
CHOOSES = """
task: which_sum
dataset_path: json
dataset_kwargs: {data_files: {test: FILE}}
output_type: multiple_choice
test_split: test
doc_to_text: "{{question}}"
doc_to_choice: "{{choices}}"
doc_to_target: "{{target}}"
target_delimiter: " "
metric_list: [{metric: acc}]
"""


@pytest.fixture(name="tasks", scope="module")
def folder_of_tasks(tmp_path_factory, model):
    """A task whose answers the untrained model gives, and one of choices."""
    folder = tmp_path_factory.mktemp("tasks")
    questions = [f"what is {a} plus {a + 1}?" for a in range(6)]
    encode, more = model.tokenizer.encode, {"max_new": 12, "block": 8, "stop": model.vocab.end_turn}
    said = [model.generate(np.array(encode(question)), **more) for question in questions]
    rows = [
        {"question": q, "answer": text.text if i % 3 else "another",
         "choices": ["a seven", "a", "nine and two"], "target": i % 3}
        for i, (q, text) in enumerate(zip(questions, said, strict=True))
    ]  # fmt: skip
    file = folder / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    for name, text in (("sums_in_words", GENERATES), ("which_sum", CHOOSES)):
        (folder / f"{name}.yaml").write_text(text.replace("FILE", str(file)))
    return folder, rows


def run(folder, tasks, out, model, **settings):
    from mmada_jax.measure.evaluation import evaluate

    return evaluate(
        model, tasks, out, {"block": 8, "draws": 6, "batch_size": 8} | settings, include=str(folder)
    )


@pytest.mark.slow
def test_tasks_of_the_harness(tasks, model_workdir, model, tmp_path, monkeypatch):
    folder, rows = tasks
    monkeypatch.setenv("HF_DATASETS_OFFLINE", "1")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    report = run(folder, ["sums_in_words", "which_sum"], tmp_path / "out", model_workdir)
    # A third of the answers were changed.
    metrics = report["tasks"]["sums_in_words"]["metrics"]
    assert metrics["exact_match,none"] == pytest.approx(4 / 6)
    assert report["tasks"]["sums_in_words"]["counts"]["effective"] == 6

    encode, right = model.tokenizer.encode, 0
    for row in rows:
        scores = []
        for choice in row["choices"]:
            whole, context = encode(f"{row['question']} {choice}"), encode(row["question"])
            pair = likelihood.Pair(context, whole[len(context) :])
            scores.append(likelihood.log_likelihoods(model, [pair], 6, rows=8)[0])
        right += int(np.argmax(scores)) == row["target"]
    assert report["tasks"]["which_sum"]["metrics"]["acc,none"] == pytest.approx(right / 6)
    assert {"jax", "lm_eval"} <= set(report["versions"])
    table = (tmp_path / "out" / "results.md").read_text()
    assert "| sums_in_words | exact_match,none | 0.6667" in table
    assert "sample_len" not in table
    assert "chat False" in table

    # Again: nothing is asked a second time, and a line that was cut off is asked anew.
    answers = tmp_path / "out" / "answers.jsonl"
    lines = answers.read_text().splitlines(keepends=True)
    assert len(lines) == 6 + 18
    answers.write_text("".join(lines[:-1]) + lines[-1][:20])
    asked = []
    score = likelihood.log_likelihoods

    def counted(model, pairs, *more):
        asked.extend(pairs)
        return score(model, pairs, *more)

    monkeypatch.setattr(likelihood, "log_likelihoods", counted)
    again = run(folder, ["sums_in_words", "which_sum"], tmp_path / "out", model_workdir)
    assert again["tasks"] == report["tasks"]
    assert len(asked) == 1
    assert sorted(answers.read_text().splitlines(keepends=True)) == sorted(lines)
    # Other settings are other answers, and other results aren't written over these.
    with pytest.raises(ValueError, match="results of another settings; name another --out"):
        run(folder, ["which_sum"], tmp_path / "out", model_workdir, seed=1)
    (tmp_path / "out" / "results.json").unlink()
    run(folder, ["which_sum"], tmp_path / "out", model_workdir, seed=1)
    assert len(answers.read_text().splitlines()) == 6 + 36


def test_a_conversation_is_asked_as_one(model):
    from mmada_jax.measure.harness import HarnessModel

    made = HarnessModel(model)
    turns = [{"role": "user", "content": "say <|eot_id|>"}]
    text = made.apply_chat_template(turns)
    v = model.vocab
    ids = made.tok_encode(text)
    assert ids[0] == v.bos
    assert ids.count(v.end_turn) == 1
    assert made.tok_encode(text + "so")[: len(ids)] == ids
    # The same string that no template has made is text.
    assert v.bos not in HarnessModel(model).tok_encode(text)


def test_a_thought_is_asked_for_as_in_training(model):
    from mmada_jax.measure.harness import HarnessModel

    made, turns = HarnessModel(model, think=True), [{"role": "user", "content": "what is 3 plus 4?"}]
    text = made.apply_chat_template(turns)
    asked = records.with_think_prompt(turns, records.THINK_PROMPT)
    assert made.tok_encode(text) == model.tokenizer.encode(chat(asked))


def test_choices_are_scored_behind_a_whole_conversation(model):
    from mmada_jax.measure.harness import HarnessModel

    made = HarnessModel(model)
    first = [{"role": "user", "content": "what is 3 plus 4?"}]
    longer = [*first, {"role": "assistant", "content": "7"}, {"role": "user", "content": "and now?"}]
    texts = [made.apply_chat_template(turns) for turns in (first, longer)]
    for turns, text in zip((first, longer), texts, strict=True):
        context, continuation = made._encode_pair(text, "seven")
        assert context == list(model.text_job([turns], max_new=1).rows.tokens[0][: len(context)])
        assert continuation == model.tokenizer.encode("seven")
    # The longer one isn't read as the shorter one and text.
    assert made.tok_encode(texts[1]).count(model.vocab.start_header) == 4
    asked = [types.SimpleNamespace(args=(texts[0], " seven"))]
    [(value, _)] = HarnessModel.loglikelihood(made, asked)
    assert value < 0


def test_what_an_answer_depends_on_is_in_its_key(model, tmp_path):
    from mmada_jax.measure.harness import HarnessModel

    def asked(**settings):
        return types.SimpleNamespace(args=("what is 3 plus 4?", {"until": [], **settings}))

    def answers(*requests, **named):
        named = {"block": 4, "answers": str(tmp_path / "answers.jsonl")} | named
        return HarnessModel(model, **named).generate_until(requests)

    short, long = answers(asked(), max_new=4), answers(asked(), max_new=16)
    assert short != long
    assert answers(asked(max_gen_toks=16)) == long
    before = len((tmp_path / "answers.jsonl").read_text().splitlines())
    assert answers(*[asked(max_gen_toks=9)] * 3) == answers(asked(max_gen_toks=9)) * 3
    assert len((tmp_path / "answers.jsonl").read_text().splitlines()) == before + 1
    assert answers(asked(max_gen_toks=16), max_new=4) == short
    # Repeats of a sampled request are draws of their own, and the same ones when it is run again.
    sampled = [asked(do_sample=True, temperature=2.0, max_gen_toks=12)] * 4
    once = answers(*sampled)
    assert len(set(once)) > 1
    assert answers(*sampled) == once


def test_damaged_answers_and_a_second_writer(tmp_path):
    from mmada_jax.measure.answers import Answers, alone

    path = tmp_path / "answers.jsonl"
    path.write_bytes(b'5\n[[1], 2]\n\xff\xfe\n["a", "kept"]\n["b", 7]\n["c"')
    answers = Answers(path)
    assert (len(answers), answers.get("a")) == (1, "kept")
    answers.put("d", [1.0, False])
    assert len(Answers(path)) == 2
    with alone(tmp_path):
        second = alone(tmp_path)
        with pytest.raises(ValueError, match="another evaluation writes to"):
            second.__enter__()
    with alone(tmp_path):
        pass


def test_nothing_before_an_answer_is_the_beginning_of_a_text(model):
    from mmada_jax.measure.harness import HarnessModel

    request = types.SimpleNamespace(args=("", {"until": [], "max_gen_toks": 4}))
    [said] = HarnessModel(model, block=4).generate_until([request])
    want = model.generate(np.array([model.vocab.bos]), max_new=4, block=4, stop=model.vocab.end_turn)
    assert said == want.text


def test_an_adapter_takes_part(model):
    from mmada_jax.measure.harness import HarnessModel

    config = lora.LoraConfig(2, 8.0)
    arrays = jax.tree.map(lambda x: x + 0.1, lora.init_adapters(jax.random.key(0), model.config, config))
    beside = lora.beside({}, arrays, config)["lora"]
    everywhere = jax.tree.map(lambda _: sharding.replicated(model.mesh), beside)
    both = dataclasses.replace(model, adapters={"one": jax.device_put(beside, everywhere)})
    pair = likelihood.Pair(model.tokenizer.encode("what is this?"), [20])
    values = [likelihood.log_likelihoods(of, [pair])[0] for of in (model, both, both.adapted("one"))]
    assert values[0] == pytest.approx(values[1], abs=1e-5)
    assert values[2] != pytest.approx(values[0], abs=1e-2)
    request = [types.SimpleNamespace(args=("what is 3 plus 4?", {"until": [], "max_gen_toks": 12}))]
    said = [HarnessModel(of, block=4).generate_until(request) for of in (model, both.adapted("one"))]
    assert said[0] != said[1]


def test_greedy_is_looked_up_by_decoding(model):
    from mmada_jax.measure.harness import HarnessModel

    made, context = HarnessModel(model, greedy=True, draws=2), model.tokenizer.encode("what is 3 plus 4?")
    [ids] = model.run(model.text_job(np.array(context), max_new=5, block=5))
    wrong = [*ids[:-1], (ids[-1] + 1) % 50]
    asked = [(None, context, list(map(int, more))) for more in (ids, wrong)]
    assert [is_greedy for _, is_greedy in made._loglikelihood_tokens(asked)] == [True, False]


@pytest.mark.slow
def test_an_evaluation_that_is_killed_goes_on(tasks, model_workdir, tmp_path):
    folder, _ = tasks
    out = tmp_path / "out"
    command = [
        sys.executable, ROOT / "launch" / "evaluate.py", "--model", model_workdir, "--tasks",
        "sums_in_words,which_sum", "--include-path", folder, "--out", out, "--draws", "6", "--block", "8",
    ]  # fmt: skip
    environment = os.environ | {"XLA_FLAGS": xla_flags(1), "HF_DATASETS_CACHE": str(tmp_path / "cache")}
    answers = out / "answers.jsonl"
    with subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL) as process:
        end = time.monotonic() + 120
        while not (answers.is_file() and len(answers.read_text().splitlines()) >= 2):
            assert time.monotonic() < end and process.poll() is None
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
    known = answers.read_bytes()
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert "| sums_in_words | exact_match,none | 0.6667" in done.stdout
    assert answers.read_bytes().startswith(known[: known.rfind(b"\n") + 1])
    assert len(answers.read_text().splitlines()) == 24


def test_unknown_tasks_are_named_before_the_model_is_read(tmp_path):
    from mmada_jax.measure.evaluation import evaluate

    with pytest.raises(ValueError, match="unknown tasks: nonsense"):
        evaluate("nowhere", ["nonsense"], tmp_path / "out", {})
    assert not (tmp_path / "out").exists()
