"""One batch, gone over many times: SPO keeps the ratios nearer to 1 than PPO does, as its paper argues."""

import jax
import numpy as np
from probe_envs import Probe

from pgjax.experiments.ratio_study import OBJECTIVES, ratios_over_epochs, trained_batch

EPOCHS, SEEDS = 60, 2


def test_spo_keeps_the_ratio_in_its_band_where_ppo_and_no_clip_do_not():
    env = Probe("responding", continuous=True)
    keys = jax.random.split(jax.random.key(0), SEEDS)
    algorithm, learner, batch = trained_batch(env, keys, warm_up=1, num_envs=8, num_steps=32, hidden_sizes=(16,))
    found = {}
    for name, objective in OBJECTIVES.items():

        def study(learner, batch, key, objective=objective):
            return ratios_over_epochs(algorithm, learner, batch, objective, EPOCHS, key)

        found[name] = jax.tree.map(np.asarray, jax.jit(jax.vmap(study))(learner, batch, keys))
    for values in found.values():
        assert values["mean"].shape == (SEEDS, EPOCHS) and (values["max"] >= values["mean"]).all()
        # The same batch and the same first minibatch: one policy-gradient step apart at most.
        np.testing.assert_allclose(values["mean"][:, 0], found["PPO"]["mean"][:, 0], rtol=0.3)
    furthest = {name: values["mean"].max(1) for name, values in found.items()}
    assert (furthest["SPO"] < furthest["PPO"]).all() and (furthest["PPO"] < furthest["no clip"]).all()
    assert (furthest["SPO"] <= 1.2 * 0.2).all()
    # What holds the ratios costs surrogate.
    assert (found["no clip"]["surrogate"][:, -1] > found["PPO"]["surrogate"][:, -1]).all()
    assert (found["PPO"]["surrogate"][:, -1] > found["SPO"]["surrogate"][:, -1]).all()
