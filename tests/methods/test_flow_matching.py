"""The objective: its path, its metrics, and the floor of Gaussian predictors."""

import dataclasses

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxherd.core.errors import JaxherdError
from jaxherd.data.coupling import coupled_noise
from jaxherd.methods.flow_matching import FlowMatching, gaussian_floor
from jaxherd.models.velocity_transformer import (
    Condition,
    LabelEmbedding,
    VelocityTransformerConfig,
)
from jaxherd.training.metrics import add, means

KEY = jax.random.key(0)


@dataclasses.dataclass
class Recorder:
    """A model that gives a velocity of (z, t) and writes down what it saw."""

    velocity: object
    seen: list = dataclasses.field(default_factory=list)

    def condition(self, batch):
        return None

    def __call__(self, z, t, condition, *, remat):
        self.seen.append((z, t, condition))
        return self.velocity(z, t)


def latents(rows, covariance, seed=0):
    rng = np.random.default_rng(seed)
    size = len(covariance)
    x = rng.multivariate_normal(np.zeros(size), covariance, rows)
    noise = rng.standard_normal((rows, size))
    return {
        name: jnp.asarray(value.reshape(rows, 2, -1), jnp.float32)
        for name, value in (("latents", x), ("noise", noise))
    }


def covariance(seed=1, size=6):
    a = np.random.default_rng(seed).standard_normal((size, size))
    return a @ a.T / size + 0.05 * np.eye(size)


def best_linear(s):
    """v = A_t z, A_t = (t S - (1 - t) I)(t^2 S + (1 - t)^2 I)^-1."""

    def velocity(z, t):
        eye = jnp.eye(len(s))
        t = t[:, None, None]
        a = (t * s - (1 - t) * eye) @ jnp.linalg.inv(t**2 * s + (1 - t) ** 2 * eye)
        return jnp.einsum("bij,bj->bi", a, z.reshape(len(z), -1)).reshape(z.shape)

    return velocity


def test_the_floor_is_what_the_best_linear_predictor_reaches():
    s, times = covariance(), (0.1, 0.5, 0.9)
    objective = FlowMatching().evaluation(times)
    loss, metrics = objective(Recorder(best_linear(s)), latents(20000, s), KEY)
    floor = gaussian_floor(s, np.asarray(times))
    found = means(metrics)
    for t, wanted in zip(times, floor):
        assert found[f"loss_at/{t:g}"] == pytest.approx(wanted, rel=0.02)
        assert gaussian_floor(s, t) == pytest.approx(wanted)
    assert float(loss) == pytest.approx(floor.mean(), rel=0.02) == found["loss"]
    assert found["path_curvature"] == pytest.approx(6 * found["loss"], rel=1e-5)
    # White data: w = 1 gives 1 / (t^2 + (1 - t)^2).
    np.testing.assert_allclose(gaussian_floor(np.eye(3), np.asarray([0.0, 0.5, 1.0])), [1, 2, 1])
    with pytest.raises(ValueError, match="symmetric"):
        gaussian_floor(np.triu(np.ones((3, 3))), 0.5)


def test_the_path_and_its_metrics():
    model, batch = Recorder(lambda z, t: jnp.zeros_like(z)), latents(256, np.eye(6))
    loss, metrics = FlowMatching()(model, batch, KEY)
    ((z, t, _),) = model.seen
    x1, x0 = batch["latents"], batch["noise"]
    straight = t[:, None, None] * x1 + (1 - t)[:, None, None] * x0
    assert 1e-6 < float(jnp.abs(z - straight).max()) < 1e-4  # the jitter of 1e-5
    assert float(loss) == pytest.approx(float(jnp.square(x1 - x0).mean()), rel=1e-5)
    buckets = {n: v for n, v in metrics.items() if n.startswith("loss_at/")}
    assert list(buckets) == [f"loss_at/{i / 5:.1f}-{(i + 1) / 5:.1f}" for i in range(5)]
    assert sum(float(weight) for _, weight in buckets.values()) == 256
    total = sum(float(value) for value, _ in buckets.values())
    assert total == pytest.approx(256 * float(loss), rel=1e-5)
    inside = np.asarray((t >= 0.2) & (t < 0.4))
    assert float(buckets["loss_at/0.2-0.4"][1]) == inside.sum()


def test_times():
    draw = FlowMatching().sample_times(KEY, 20000)
    logit = np.log(draw / (1 - draw))
    assert logit.mean() == pytest.approx(0, abs=0.03) and logit.std() == pytest.approx(1, abs=0.02)
    other = FlowMatching(time_mean=1.0, time_std=0.5).sample_times(KEY, 20000)
    assert np.log(other / (1 - other)).mean() == pytest.approx(1, abs=0.03)
    uniform = FlowMatching(time="uniform").sample_times(KEY, 20000)
    assert uniform.mean() == pytest.approx(0.5, abs=0.01)
    assert uniform.var() == pytest.approx(1 / 12, rel=0.03)


def test_the_key_decides_and_evaluation_has_no_luck():
    model, batch = Recorder(lambda z, t: z), latents(32, np.eye(6))
    losses = [float(FlowMatching()(model, batch, jax.random.key(k))[0]) for k in (0, 0, 1)]
    assert losses[0] == losses[1] != losses[2]
    fixed = [float(FlowMatching().evaluation()(model, batch, jax.random.key(k))[0]) for k in (0, 1)]
    # The same times; only the jitter differs.
    assert fixed[0] == pytest.approx(fixed[1], rel=1e-4)


class Conditional(Recorder):
    def condition(self, batch):
        mask = (batch["labels"] >= 0)[:, None]
        return Condition(jnp.zeros((*mask.shape, 8)), mask)


@pytest.mark.parametrize("dropout, kept", [(0.0, 1.0), (0.25, 0.75), (1.0, 0.0)])
def test_condition_dropout(dropout, kept):
    model = Conditional(lambda z, t: jnp.zeros_like(z))
    batch = latents(4000, np.eye(6)) | {"labels": jnp.ones(4000, jnp.int32)}
    FlowMatching(condition_dropout=dropout)(model, batch, KEY)
    assert float(model.seen[0][2].mask_BL.mean()) == pytest.approx(kept, abs=0.02)
    model.seen.clear()
    FlowMatching(condition_dropout=dropout).evaluation((0.5,))(model, batch, KEY)
    assert model.seen[0][2].mask_BL.all()


def test_gradients_reach_every_parameter_and_flops_count_the_text():
    config = VelocityTransformerConfig(
        8, 3, 2, latent_dim=3, conditioner=LabelEmbedding(2), bias_attn=True, layer_scale=0.5
    )
    batch = latents(4, np.eye(6)) | {"labels": jnp.asarray([0, 1, 1, 0])}
    objective = FlowMatching(condition_dropout=0.0)
    gradients = jax.jit(jax.grad(lambda m: objective(m, batch, KEY)[0]))(jax.jit(config.build)(KEY))
    for path, gradient in jax.tree_util.tree_leaves_with_path(gradients):
        assert float(jnp.abs(gradient).max()) > 0, path
    spec = {k: jax.ShapeDtypeStruct(v.shape, v.dtype) for k, v in batch.items()}
    assert objective.train_flops(config, spec) == config.train_flops(4, 2, 1)
    spec["text_states"] = jax.ShapeDtypeStruct((4, 9, 5), jnp.float32)
    assert objective.train_flops(config, spec) == config.train_flops(4, 2, 9)


def test_coupling_straightens_the_path():
    """The best constant-in-z predictor is as good, but pairs are closer: less to be explained."""
    x = np.random.default_rng(0).standard_normal((64, 2, 3)).astype(np.float32)
    noise, _ = coupled_noise(x, 0)
    model = Recorder(lambda z, t: jnp.zeros_like(z))
    apart = np.random.default_rng(0).standard_normal(x.shape, dtype=np.float32)
    curved, straight = (
        float(FlowMatching()(model, {"latents": jnp.asarray(x), "noise": jnp.asarray(n)}, KEY)[0])
        for n in (apart, noise)
    )
    assert straight < 0.6 * curved


NETWORK = VelocityTransformerConfig(8, 1, 2, latent_dim=3, conditioner=LabelEmbedding(2))
# Nothing random but the jitter, which is off: rows of any length meet the same times.
STILL = FlowMatching(sigma_min=0.0).evaluation((0.2, 0.7))


def padded_batch(lengths, frames=6, seed=0):
    rng = np.random.default_rng(seed)
    mask = (np.arange(frames) < np.asarray(lengths)[:, None]).astype("f4")
    x, noise = rng.standard_normal((2, len(lengths), frames, 3)).astype("f4") * mask[..., None]
    labels = np.arange(len(lengths), dtype=np.int32) % 2
    batch = {"latents": x, "noise": noise, "frame_mask": mask, "labels": labels}
    return {name: jnp.asarray(value) for name, value in batch.items()}


def cut(batch, row, length):
    """The row alone, without its padding."""
    fields = {name: batch[name][row : row + 1] for name in ("latents", "noise", "labels")}
    return fields | {name: fields[name][:, :length] for name in ("latents", "noise")}


def test_padding_does_not_count():
    """Loss and gradient are the means over all real frames of the rows without padding."""
    lengths = (4, 1)
    batch = padded_batch(lengths, frames=5)
    model = jax.jit(NETWORK.build)(KEY)

    def alone(model):
        losses = [STILL(model, cut(batch, row, n), KEY)[0] for row, n in enumerate(lengths)]
        return sum(n * loss for n, loss in zip(lengths, losses)) / sum(lengths)

    differentiate = jax.jit(jax.value_and_grad(lambda m, b: STILL(m, b, KEY), has_aux=True))
    wanted, of_alone = jax.jit(jax.value_and_grad(alone))(model)
    # What stands in the padding makes no difference either.
    real = batch["frame_mask"][..., None] > 0
    for latents in (batch["latents"], jnp.where(real, batch["latents"], 9.0)):
        (loss, metrics), gradients = differentiate(model, {**batch, "latents": latents})
        assert float(loss) == pytest.approx(float(wanted), rel=1e-5)
        chex.assert_trees_all_close(gradients, of_alone, atol=1e-5)
        found = means(metrics)
        assert found["loss"] == pytest.approx(float(wanted), rel=1e-5)
        assert found["real_frames"] == pytest.approx(5 / 10)
        assert np.mean([found["loss_at/0.2"], found["loss_at/0.7"]]) == pytest.approx(found["loss"])
        assert found["path_curvature"] == pytest.approx(found["loss"] * 3 * 5 / 2, rel=1e-5)


def test_random_times_and_dropout_are_those_without_a_mask():
    """A mask of ones changes neither draws nor values; random times weigh rows by their frames."""
    batch = padded_batch((6, 6, 6, 6))
    plain = {name: value for name, value in batch.items() if name != "frame_mask"}
    model = Recorder(lambda z, t: jnp.sin(z))
    loss, with_mask = FlowMatching()(Padded(model), batch, KEY)
    other, without = FlowMatching()(model, plain, KEY)
    for a, b in zip(*model.seen):
        np.testing.assert_array_equal(a, b)
    assert float(loss) == pytest.approx(float(other), rel=1e-6)
    with_mask, without = means(with_mask), means(without)
    assert with_mask.pop("real_frames") == 1.0 and with_mask.keys() == without.keys()
    for name, value in without.items():
        np.testing.assert_allclose(with_mask[name], value, rtol=1e-5)
    loss, sums = FlowMatching()(Padded(model), padded_batch((6, 1, 2, 3)), KEY)
    buckets = [value for name, value in sums.items() if name.startswith("loss_at/")]
    total, weight = (float(sum(b[i] for b in buckets)) for i in range(2))
    assert weight == 12 and total / weight == pytest.approx(float(loss), rel=1e-5)


def test_parts_of_a_batch_add_up(devices):
    """Weights are frames: halves of unequal length, and rows on eight devices, give the whole."""
    batch, model = padded_batch((6, 6, 5, 6, 1, 2, 1, 1)), Padded(Recorder(lambda z, t: jnp.sin(z)))
    call = jax.jit(lambda batch: STILL(model, batch, KEY)[1])
    whole = call(batch)
    halves = [call({name: x[s] for name, x in batch.items()}) for s in (slice(4), slice(4, 8))]
    summed = means(add(*halves))
    mesh = jax.sharding.Mesh(np.asarray(devices), "rows")
    rows = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("rows"))
    apart = means(call(jax.device_put(batch, rows)))
    assert float(whole["loss"][1]) == 28
    for name, value in means(whole).items():
        np.testing.assert_allclose(summed[name], value, rtol=1e-5)
        np.testing.assert_allclose(apart[name], value, rtol=1e-5)
    # The mean of the halves' means is another number.
    assert abs(np.mean([means(h)["loss"] for h in halves]) - means(whole)["loss"]) > 1e-3


def test_the_coupling_is_reported():
    """Paired by chance the distance is what it is for any draw; assigned it is less."""
    x = (0.5 * np.random.default_rng(0).standard_normal((64, 4, 3))).astype(np.float32)
    model = Recorder(lambda z, t: jnp.zeros_like(z))
    apart = np.random.default_rng(1).standard_normal(x.shape, dtype=np.float32)
    together, coupling = coupled_noise(x, 1)
    found = {}
    for name, noise in (("apart", apart), ("together", together)):
        batch = {"latents": jnp.asarray(x), "noise": jnp.asarray(noise)}
        found[name] = means(FlowMatching()(model, batch, KEY)[1])
    for values in found.values():
        assert values["coupling/independent"] == pytest.approx(np.square(x).mean() + 1, rel=1e-5)
    assert found["apart"]["coupling/paired"] == pytest.approx(coupling.cost_before / 12, rel=1e-5)
    assert found["together"]["coupling/paired"] == pytest.approx(coupling.cost_after / 12, rel=1e-5)
    assert found["apart"]["coupling/paired"] == pytest.approx(1.25, rel=0.1)
    assert found["together"]["coupling/paired"] < 0.8 * found["together"]["coupling/independent"]
    # Padded frames count in neither.
    values = means(FlowMatching()(Padded(model), padded_batch((6, 1, 2, 3)), KEY)[1])
    batch = padded_batch((6, 1, 2, 3))
    total = float(jnp.square(batch["latents"] - batch["noise"]).sum())
    assert values["coupling/paired"] == pytest.approx(total / 36, rel=1e-5)
    power = float(jnp.square(batch["latents"]).sum())
    assert values["coupling/independent"] == pytest.approx(power / 36 + 1, rel=1e-5)


@dataclasses.dataclass
class Padded:
    """A recorder that takes a mask as well."""

    recorder: Recorder

    def condition(self, batch):
        return None

    def __call__(self, z, t, condition, *, remat, seen_BT):
        assert seen_BT.shape == z.shape[:2] and seen_BT.dtype == bool
        return self.recorder(z, t, condition, remat=remat)


def test_errors():
    for make, message in [
        (lambda: FlowMatching(condition_dropout=1.5), "1.5"),
        (lambda: FlowMatching(times=(0.5, 2.0)), "between 0 and 1"),
    ]:
        with pytest.raises(JaxherdError, match=message):
            make()
