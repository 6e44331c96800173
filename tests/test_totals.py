"""Long sums with their running totals: chains and their split, what the checker accepts, a run of them."""

import pickle
import types

import numpy as np
import pytest

from configs import totals as config
from mmada_jax import MMaDA
from mmada_jax.data import sources, totals
from mmada_jax.diffusion.rules import TextRule
from mmada_jax.measure import totals as measured
from mmada_jax.tokens.tokenizer import TextTokenizer, chat
from mmada_jax.train import runs
from mmada_jax.train.supervised import train

TERMS = (3, 1, 2, 3, 1, 1, 3, 2, 2, 3, 2, 2)
CHAIN = totals.Chain(TERMS, 2)


@pytest.fixture(scope="module")
def tokenizer():
    chains = [totals.open_records("1-9", "train").chain(i) for i in range(20)]
    return TextTokenizer.train([chat(chain.question, chain.answer) for chain in chains], 384)


# ---- Chains ----------------------------------------------------------------------------------------


def test_a_chain_asks_and_answers():
    asked = CHAIN.question.split("\n")
    assert len(asked) == 12
    assert asked[:2] == ["a2:x+3=y", "b2:x+1=y"] and asked[-1] == "l2:x+2=y"
    said = CHAIN.answer.split("\n")
    assert said[:3] == ["<think>a1:0+3=3", "b1:3+1=4", "c1:4+2=6"]
    assert said[11:13] == ["l1:3+2=5", "a2:5+3=8"]
    assert len(said) == 24 and said[-1] == "l2:8+2=0</think>0"
    for rounds in range(1, 10):
        chain = totals.Chain(TERMS, rounds)
        assert totals.parse(chain.question) == chain
        assert chain.answer.endswith(f"</think>{rounds * sum(TERMS) % 10}")


def wrong_questions():
    lines = CHAIN.question.split("\n")
    yield from ("", "a", "\n".join(lines[:11]), "\n".join([*lines, "m2:x+1=y"]), f"{CHAIN.question}\n")
    yield "\n".join(reversed(lines))
    for old, new in (
        ("a2", "a3"),
        ("a2", "a0"),
        ("x+3", "x+4"),
        ("x+3", "x+0"),
        ("x+3", "x+13"),
        ("=y", "="),
    ):
        yield CHAIN.question.replace(old, new, 1)


@pytest.mark.parametrize("text", [*wrong_questions()])
def test_other_texts_ask_for_nothing(text):
    with pytest.raises(ValueError, match="asks for no totals; it needs 12 lines"):
        totals.parse(text)


@pytest.mark.parametrize("rounds", ["1", "4", "1-4"])
def test_the_splits_share_no_terms(rounds):
    seen = {}
    for split in totals.SPLITS:
        records = totals.open_records(rounds, split)
        chains = [records.chain(i) for i in range(600)]
        assert {chain.split for chain in chains} == {split}
        assert {chain.rounds for chain in chains} == set(range(int(rounds[0]), int(rounds[-1]) + 1))
        seen[split] = {chain.terms for chain in chains}
        assert len(seen[split]) > 580  # the same terms come again, if rarely
    assert len(set.union(*seen.values())) == sum(map(len, seen.values()))


def test_records_are_functions_of_their_index():
    source = sources.open_source(sources.SourceConfig("1-4", "totals"))
    again = pickle.loads(pickle.dumps(source))
    assert again.fingerprint == source.fingerprint
    assert [again[i] for i in range(20)] == [source[i] for i in range(20)]
    assert len({source[i].key for i in range(50)}) == 50
    others = [
        sources.open_source(sources.SourceConfig("1-4", "totals", split=s)) for s in totals.SPLITS[1:]
    ]
    others.append(sources.open_source(sources.SourceConfig("1-3", "totals")))
    assert len({s.fingerprint for s in (source, *others)}) == 4
    for index in (-1, len(source)):
        with pytest.raises(IndexError, match=f"none is number {index}"):
            source[index]


@pytest.mark.parametrize("rounds", ["", "0", "10", "1-", "4-1", "0-3", "1-10", "x", "٨", "4-8-9"])
def test_other_numbers_of_rounds_are_errors(rounds):
    with pytest.raises(ValueError, match="must be a number of rounds from 1 to 9"):
        sources.open_source(sources.SourceConfig(rounds, "totals"))


def test_unknown_splits_are_errors():
    with pytest.raises(ValueError, match="unknown split 'dev'; known: train, validation, test"):
        totals.open_records("4", "dev")


def test_a_line_has_nine_tokens(tokenizer):
    for rounds in range(1, 10):
        chain = totals.open_records(str(rounds), "test").chain(rounds)
        assert len(tokenizer.encode(chain.question)) == 107
        assert len(tokenizer.encode(chain.answer)) == 108 * rounds + 2
        assert tokenizer.decode(tokenizer.encode(chain.answer)) == chain.answer


# ---- The checker -----------------------------------------------------------------------------------


def test_the_checker_accepts_the_truth_and_no_single_wrong_token(tokenizer):
    assert totals.check(CHAIN.question, CHAIN.answer) == totals.Verdict(chain=True, total=True, lines=24)
    ids = tokenizer.encode(CHAIN.answer)
    others = sorted(set(ids))
    for place, right in enumerate(ids):
        # Every token at some places, and at every place the next token of them, the one before, and none.
        near = [others[(others.index(right) + i) % len(others)] for i in (1, -1)]
        for wrong in (*(others if place % 40 == 7 else near), None):
            if wrong == right:
                continue
            changed = [*ids[:place], *([] if wrong is None else [wrong]), *ids[place + 1 :]]
            verdict = totals.check(CHAIN.question, tokenizer.decode(changed))
            assert not verdict.chain, (place, wrong)
            assert verdict.lines <= (place // 9 if place else 24)
    assert not totals.check(CHAIN.question, f"{CHAIN.answer} ").chain
    assert totals.check(CHAIN.question, "") == totals.Verdict(chain=False, total=False, lines=0)


def test_the_checker_says_what_is_right():
    right = CHAIN.answer
    wrong_line = right.replace("3+1=4\nc1:4", "3+1=5\nc1:5", 1)
    assert totals.check(CHAIN.question, wrong_line) == totals.Verdict(chain=False, total=True, lines=1)
    wrong_total = f"{right[:-1]}1"
    assert totals.check(CHAIN.question, wrong_total) == totals.Verdict(chain=False, total=False, lines=24)
    cut = right.partition("c1:4")[0]
    assert totals.check(CHAIN.question, cut) == totals.Verdict(chain=False, total=False, lines=2)
    with pytest.raises(ValueError, match="asks for no totals"):
        totals.check("3+8", right)


# ---- Measuring -------------------------------------------------------------------------------------


class Teller:
    """A model that is right about the chains in `knows`."""

    vocab = types.SimpleNamespace(end_turn=0)

    def __init__(self, tokenizer, knows):
        self.tokenizer, self.knows, self.asked = tokenizer, knows, []

    def generate(self, questions, rule, max_new, seed):
        self.asked.append((len(questions), max_new, rule, seed))
        return [
            types.SimpleNamespace(text=totals.parse(q).answer if self.knows(q) else "") for q in questions
        ]


def test_right_chains_are_counted_case_by_case(tokenizer):
    some, every = (Teller(tokenizer, knows) for knows in (lambda q: q[5] in "1", lambda q: True))
    rule = TextRule(block=32, threshold=0.9)
    few, all_ = measured.chains(some, 40, 2, rule, seed=3), measured.chains(every, 40, 2)
    assert some.asked == [(40, 224, rule, 3)]
    assert every.asked == [(40, 224, TextRule(block=32), 0)]
    assert all_.chain_B.all() and all_.total_B.all() and set(all_.lines_B) == {24}
    records = totals.open_records("2", "test")
    first = np.array([records.chain(i).terms[0] for i in range(40)])
    np.testing.assert_array_equal(few.chain_B, first < 2)
    assert str(few).startswith(f"40 chains of 2 rounds: {np.sum(first < 2)} right (")
    only_few, only_all, p = measured.mcnemar(few.chain_B, all_.chain_B)
    assert (only_few, only_all) == (0, np.sum(first >= 2))
    assert p == 2 / 2**only_all


def test_mcnemar_is_the_binomial_test_of_the_cases_that_differ():
    def cases(only_a, only_b, both=7, neither=5):
        a = [1] * only_a + [0] * only_b + [1] * both + [0] * neither
        b = [0] * only_a + [1] * only_b + [1] * both + [0] * neither
        return np.array(a, bool), np.array(b, bool)

    assert measured.mcnemar(*cases(0, 0)) == (0, 0, 1.0)
    assert measured.mcnemar(*cases(4, 4)) == (4, 4, 1.0)
    for a, b, p in ((1, 9, 22 / 1024), (9, 1, 22 / 1024), (0, 5, 2 / 32), (2, 3, 1.0)):
        assert measured.mcnemar(*cases(a, b)) == (a, b, p)


# ---- A run -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("arg", ["short", "long", "short,smoke", "long,smoke"])
def test_every_row_of_a_configuration_fits(arg, tokenizer, image_tokenizer, tmp_path):
    values = config.get_config(arg).to_dict() | {"image_tokenizer": str(image_tokenizer), "init": ""}
    tokenizer.save(tmp_path / "tokenizer.json")
    run = runs.parse(values | {"text_tokenizer": str(tmp_path)})
    plan = runs.plan(run, tmp_path)
    assert plan.model.max_len >= 1280
    splits = set()
    for of_task in (run.data, run.held_out):
        ((_, source),) = of_task["lm_chat"].items()
        chain = totals.Chain(TERMS, int(source.path[-1]))
        ids = plan.tokenizer.encode(chat(chain.question, chain.answer))
        assert plan.shape.length - 4 < len(ids) + 1 <= plan.shape.length  # EOS ends a row
        splits.add(source.split)
    assert splits == {"train", "validation"}


def test_a_run_trains_and_is_measured(image_tokenizer, tmp_path):
    values = config.get_config("long,smoke").to_dict() | {"image_tokenizer": str(image_tokenizer)}
    assert int(train(values, tmp_path).step) == values["steps"]
    outcome = measured.chains(MMaDA.load(tmp_path), 3, 1, TextRule(block=32, steps=4))
    assert len(outcome.answers) == len(outcome.chain_B) == len(outcome.lines_B) == 3
    assert outcome.seconds > 0
