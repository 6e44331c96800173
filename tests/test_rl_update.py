"""Updates: the first one is the policy gradient, what isn't scored has none, and gradients measured."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mmada_jax.config import from_dict
from mmada_jax.diffusion import loss
from mmada_jax.nets import transformer
from mmada_jax.train.rl import unigrpo, update
from mmada_jax.train.rl.diagnose import diagnose
from mmada_jax.train.rl.run import RLRun
from tests.rl_toys import one_device, rl_config, rolled_out, toy_rewards  # noqa: F401


def batch_of(run, opened, rollout, scored, advantage, fresh):
    R = len(rollout.tokens_RL)
    chosen = update.Chosen(np.arange(R), np.asarray(advantage, np.float32), np.full(R, 1 / R, np.float32))
    return update.UpdateBatch(scored, rollout.tokens_RL, rollout.valid_RL, chosen, np.full(R, fresh))


@pytest.mark.parametrize(
    ("name", "masking", "cache", "ratio"),
    [
        ("text", "unigrpo", "none", "token"),
        ("text", "exact", "none", "token"),
        ("text", "exact", "dual", "token"),
        ("text", "uniform", "none", "token"),
        ("text", "top_entropy", "dual", "none"),
        ("text", "random", "none", "sequence"),
        ("text", "surprisal", "none", "token"),
        ("draw", "full", "none", "token"),
        ("draw", "fading", "none", "sequence"),
    ],
)
def test_the_first_inner_update_is_the_policy_gradient(config, name, masking, cache, ratio):
    config["tasks"]["text"]["text"] |= {"cache": cache}
    changed = {"beta": 0.1, "kl": "reference", "ratio": ratio}
    run, model, params, opened, rollout = rolled_out(config, name, masking, **changed)
    advantage = np.random.default_rng(0).normal(size=len(rollout.tokens_RL)).astype(np.float32)
    with jax.set_mesh(model.mesh):
        scored = opened.score(params, params, rollout, jax.random.key(5), 0)
        values, gradients = {}, {}
        for fresh in (True, False):
            batch = batch_of(run, opened, rollout, scored, advantage, fresh)

            @jax.jit
            def of(params, batch):
                return opened.objective.loss(params, opened.objective.prepare(None, batch))

            (_, values[fresh]), gradients[fresh] = jax.value_and_grad(of, has_aux=True)(params, batch)

        @jax.jit
        def policy(params):
            h = transformer.hidden_states(params, model.config, scored.seen_RL, rollout.valid_RL)
            head, targets = update.response_head(params, rollout.tokens_RL, opened.at, model.vocab)
            weight = jnp.asarray(advantage)[:, None] * jnp.where(scored.scored_RL, 1.0, 0.0)
            if cache != "none":
                weight *= jnp.minimum(2, jnp.exp(scored.old_RL - rollout.logp_RL))
            count = jnp.maximum(1, scored.scored_RL.sum(axis=1, keepdims=True)).astype(jnp.float32)
            return loss.weighted_nll(
                h, head, targets, weight / count * scored.weight_R[:, None] / len(advantage)
            )[0]

        want = jax.grad(policy)(params)
    assert float(values[True]["ratio_error"]) == 0
    assert float(values[True]["clip_fraction"]) == 0
    assert float(values[False]["ratio_error"]) < 1e-4  # by the scores of another opened
    assert float(values[False]["kl"]) < 1e-8
    if cache != "none":
        moved = np.abs(np.asarray(scored.old_RL - rollout.logp_RL))[np.asarray(scored.scored_RL)]
        assert moved.max() > 1e-4  # the cache changes something, or there is nothing to correct
        assert 0.5 < float(values[True]["correction"]) < 2
    for fresh in (True, False):
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-5), gradients[fresh], want
        )


@pytest.mark.parametrize("order", [{"order": "emerge"}, {"order": "halton", "columns": 4}], ids=str)
def test_exact_is_unbiased_for_images_whose_order_does_not_depend_on_the_draw(config, order):
    config["tasks"]["draw"]["image"] |= {"steps": 4, **order}
    run, model, _, _, rollout = rolled_out(config, "draw", "exact", mu=2)
    step = np.asarray(rollout.step_RL)
    assert len(np.unique(step[step >= 0])) == 4
    size_R = np.asarray(rollout.response_RL).sum(axis=1)
    assert (size_R == model.n_image).all()

    def gradients_of(masking, n, keys, mu):
        """d loss / d log-probability of each token, the mean over keys and n inner updates."""
        settings = dataclasses.replace(run.objective, masking=masking, mu=mu)

        def one(key, n):
            masked = unigrpo.hide(key, rollout, n, model.vocab.mask, masking, settings, True)

            def of(new_RL):
                advantage_R = jnp.linspace(-1, 1, len(step))
                of_rows = (advantage_R, masked.scored_RL, masked.weight_R, settings.clip, 0.0)
                return unigrpo.objective(new_RL, jax.lax.stop_gradient(new_RL), new_RL, *of_rows)[0]

            return jax.grad(of)(rollout.logp_RL)

        each = jax.vmap(jax.vmap(one, (None, 0)), (0, None))
        return np.asarray(jax.jit(each)(jax.random.split(jax.random.key(1), keys), jnp.arange(n)))

    every_RL = gradients_of("every", model.n_image, 1, model.n_image).mean(axis=(0, 1))
    draws = gradients_of("exact", 2, 2000, 2).mean(axis=1)
    error_RL = (draws.mean(axis=0) - every_RL) / (draws.std(axis=0) / np.sqrt(2000) + 1e-7)
    assert np.abs(error_RL).max() < 4.5
    assert draws.std(axis=0)[step >= 0].min() > 0
    np.testing.assert_array_equal(every_RL[step < 0], 0)


def test_rows_without_a_ratio_weigh_by_the_softmax_of_their_advantages(config):
    config["objective"] |= {"ratio": "none"}
    run = from_dict(RLRun, config)
    task = run.tasks["text"]
    total = np.random.default_rng(0).normal(size=task.groups * run.objective.responses).astype(np.float32)
    total[: run.objective.responses] = 1  # a group without differences
    chosen, _ = update.choose(run, task, total)
    rewards = total.reshape(task.groups, -1)
    want = unigrpo.weights(unigrpo.advantages(rewards)).ravel()[chosen.which_S]
    np.testing.assert_array_equal(chosen.advantage_S, want)
    assert not chosen.advantage_S[chosen.which_S < run.objective.responses].any()


def test_padding_and_what_follows_the_end_have_no_gradient(config):
    config["tasks"]["text"] |= {"groups": 2, "update_groups": 2}
    run, model, params, opened, rollout = rolled_out(config, "text")
    with jax.set_mesh(model.mesh):
        scored = opened.score(params, None, rollout, jax.random.key(5), 0)
        advantage = np.ones(len(rollout.tokens_RL))
        batch = batch_of(run, opened, rollout, scored, advantage, True)
        rows, _, _ = opened.objective.prepare(None, batch)
        table = params["embed_VD"]

        def of(x_RLD):
            # Rows of embeddings of their own: position i of all rows looks up id i of another table.
            R, L, D = x_RLD.shape
            unused_D = jnp.zeros((len(table) - R * L, D))
            moved_params = params | {"embed_VD": jnp.concatenate([x_RLD.reshape(R * L, D), unused_D])}
            ids = jnp.arange(R * L, dtype=jnp.int32).reshape(R, L)
            moved = rows[0]._replace(seen_RL=ids), *rows[1:]
            return opened.objective.loss(moved_params, (moved, batch.chosen, batch.fresh_S))[0]

        grad = np.asarray(jax.jit(jax.grad(of))(table[scored.seen_RL]))
        assert np.abs(grad[np.asarray(rollout.valid_RL)]).sum() > 0
        assert not grad[~np.asarray(rollout.valid_RL)].any()

        # A token after the end counts for nothing: another one there changes no gradient.
        @jax.jit
        def gradients(targets_RL):
            prepared = ((rows[0], targets_RL, rows[2]), batch.chosen, batch.fresh_S)
            return jax.grad(lambda params: opened.objective.loss(params, prepared)[0])(params)

        other = jnp.where(rollout.response_RL, rollout.tokens_RL, (rollout.tokens_RL + 1) % 50)
        assert (other != rollout.tokens_RL).any()
        jax.tree.map(np.testing.assert_array_equal, gradients(rollout.tokens_RL), gradients(other))


@pytest.mark.slow
def test_the_measured_gradient_of_exact_masks_is_nearer_to_all_reveals_than_that_of_ratios(
    config, tmp_path, capsys
):
    text = config["tasks"]["text"] | {"groups": 8, "update_groups": None, "rewards": {"long": 1.0}}
    config = config | {
        "tasks": {"text": text},
        "objective": config["objective"] | {"mu": 8, "responses": 8},
    }
    found = diagnose(config, tmp_path, ["unigrpo", "exact"], 2)["text"]
    assert list(found) == ["every", "unigrpo", "exact"]
    told = capsys.readouterr().out
    assert re.search(r"text: every \(1 of 3\), ETA (?!0s)", told) and "exact (3 of 3), ETA 0s" in told
    np.testing.assert_allclose(found["every"]["with_every"], 1, rtol=1e-5)
    assert 1 > found["exact"]["with_every"] > found["unigrpo"]["with_every"]
    assert all(values["norm"] > 0 for values in found.values())
    assert not (tmp_path / "checkpoints").exists()
    with pytest.raises(ValueError, match="maskings luck"):
        diagnose(config, tmp_path, ["luck"], 2)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jax, "process_count", lambda: 4)
        with pytest.raises(ValueError, match="4 processes; gradients"):
            diagnose(config, tmp_path, ["exact"], 2)
