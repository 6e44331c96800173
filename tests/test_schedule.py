import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mmada_jax.diffusion import schedule

NAMES = ("cosine", "linear", "pow2", "pow0.5", "pow3", "sigmoid")


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("xp", [np, jnp])
def test_runs_from_one_to_zero_and_only_falls(name, xp):
    t = np.linspace(0, 1, 101).astype(np.float32)
    ratio = schedule.named(name)(xp.asarray(t))
    assert ratio.dtype == np.float32 and ratio.shape == t.shape
    assert ratio[0] == 1 and abs(ratio[-1]) < 2e-6
    assert np.all(np.diff(np.asarray(ratio)) < 0)


@pytest.mark.parametrize("name", NAMES)
def test_numpy_and_jax_agree(name):
    t = np.random.default_rng(0).random((3, 7), np.float32)
    f = schedule.named(name)
    np.testing.assert_allclose(jax.jit(f)(t), f(t), atol=1e-6)


def test_powers_are_what_they_say():
    t = np.linspace(0.1, 0.9, 9).astype(np.float32)
    for k in (0.5, 1, 2, 3):
        np.testing.assert_allclose(schedule.Power(k)(t), 1 - t.astype(float) ** k, rtol=1e-5)
    assert schedule.named("linear") == schedule.named("pow1") == schedule.Power(1.0)


@pytest.mark.parametrize("name", ["cosin", "pow", "power", "powx", ""])
def test_unknown_names_are_errors(name):
    with pytest.raises(ValueError, match=f"unknown schedule '{name}'"):
        schedule.named(name)


# Section 4.1 of the reference's description. The last step hides one there: the decoding rule's
# clamp; here it is floor(N * cos(pi/2)) = -1 in float32.
TABLES = {
    (1024, 12): "1015 989 946 886 812 724 623 511 391 265 133",
    (1024, 15): "1018 1001 973 935 886 828 760 685 601 511 416 316 212 107",
    (1024, 20): "1020 1011 995 973 946 912 873 828 778 724 665 601 535 464 391 316 239 160 80",
    (256, 12): "253 247 236 221 203 181 155 127 97 66 33",
}


@pytest.mark.parametrize(("total", "steps"), TABLES)
def test_hidden_counts_of_the_cosine_schedule(total, steps):
    counts = schedule.hidden_counts(schedule.Cosine(), total, steps)
    assert counts.dtype == np.int32
    assert counts[:-1].tolist() == [int(n) for n in TABLES[total, steps].split()]
    assert counts[-1] <= 0
