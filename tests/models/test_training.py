"""The training forward against the serving one, and against transformers' logits."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from checkpoint.param_loading import flatten
from models.loading import open_model
from models.registry import get_family
from models.training import REMAT_POLICIES, TrainRows, loss_sum
from tests.models.training_rows import TINY, naive_loss, pack, random_rows

GOLDENS = Path(__file__).parent.parent / "goldens" / "tiny"
VARIANTS = sorted(path.name for path in GOLDENS.iterdir() if path.is_dir())
TIED_WINDOW = replace(
    TINY, tie_word_embeddings=True, sliding_window=5, attention_bias=False, mlp_bias=False
)
PACKED = [[5, 9], [16], [3, 4, 8]]
"""Two rows with padding behind, one that is full."""


def params_of(config) -> dict:
    params = get_family(config.family).init_params(config, jax.random.key(0), jnp.float32)
    # Larger than at the start of training: attention that is uniform would hide a wrong mask.
    return jax.tree.map(lambda leaf: 5.0 * leaf if leaf.ndim > 1 else leaf, params)


def gradient_of(config, **options):
    return jax.jit(
        jax.value_and_grad(lambda params, rows: loss_sum(params, config, rows, **options))
    )


def assert_near(tree, expected, tolerance: float) -> None:
    """Each leaf within `tolerance` of the largest value of its expected one."""
    for path, leaf in flatten(expected).items():
        scale = np.abs(leaf).max()
        assert scale > 0, f"{path}: a gradient of zeros would prove nothing"
        error = np.abs(np.asarray(flatten(tree)[path]) - leaf).max()
        assert error <= tolerance * scale, f"{path}: {error / scale}"


@pytest.mark.parametrize("config", [TINY, TIED_WINDOW], ids=["biases", "tied_window"])
def test_packed_rows_have_loss_and_gradient_of_segments_served_alone(config) -> None:
    params, rows = params_of(config), random_rows(config, PACKED, 16)
    loss, gradient = gradient_of(config)(params, rows)
    expected, expected_gradient = jax.jit(
        jax.value_and_grad(lambda params: naive_loss(params, config, rows))
    )(params)
    np.testing.assert_allclose(loss, expected, rtol=1e-5)
    assert_near(gradient, expected_gradient, 2e-5)


def test_loss_is_that_of_transformers_logits() -> None:
    source = open_model(GOLDENS / "mistral_sliding_window")
    golden = np.load(GOLDENS / "mistral_sliding_window" / "logits.npz", allow_pickle=False)
    tokens = golden["token_ids"]
    rows = pack([[tokens]], len(tokens) - 1)
    loss = loss_sum(source.load_params(jnp.float32), source.config, rows)
    logits = golden["logits"][:-1].astype(np.float64)
    chosen = logits[np.arange(len(logits)), tokens[1:]]
    nll = np.log(np.exp(logits).sum(-1)) - chosen
    np.testing.assert_allclose(loss, (rows.weights[0] * nll).sum(), rtol=1e-5)


@pytest.mark.parametrize("remat", [name for name in REMAT_POLICIES if name != "none"])
def test_rematerialisation_saves_memory_and_changes_no_gradient(remat: str) -> None:
    config = replace(TINY, num_layers=6)
    params, rows = params_of(config), random_rows(config, [[64]] * 4, 64)
    plain = gradient_of(config).lower(params, rows).compile()
    saving = gradient_of(config, remat=remat).lower(params, rows).compile()
    assert_near(saving(params, rows)[1], plain(params, rows)[1], 2e-5)
    sizes = [program.memory_analysis().temp_size_in_bytes for program in (plain, saving)]
    assert sizes[1] < 0.8 * sizes[0], sizes


def test_bfloat16_compute_gives_float32_gradients_near_the_exact_ones() -> None:
    params = get_family(TINY.family).init_params(TINY, jax.random.key(0), jnp.float32)
    rows = random_rows(TINY, PACKED, 16)
    exact_loss, exact = gradient_of(TINY)(params, rows)
    loss, gradient = gradient_of(TINY, compute_dtype=jnp.bfloat16)(params, rows)
    assert loss.dtype == jnp.float32
    assert {leaf.dtype for leaf in jax.tree.leaves(gradient)} == {np.dtype(np.float32)}
    np.testing.assert_allclose(loss, exact_loss, rtol=0.02)
    assert loss != exact_loss
    for path, leaf in flatten(exact).items():
        cosine = jnp.vdot(leaf, flatten(gradient)[path]) / (
            jnp.linalg.norm(leaf) * jnp.linalg.norm(flatten(gradient)[path])
        )
        assert cosine > 0.99, path


def test_dropout_masks_depend_on_the_rows_own_key_alone() -> None:
    params, rows = params_of(TINY), random_rows(TINY, PACKED, 16)
    keys = jax.random.split(jax.random.key(7), 3)

    @jax.jit
    def loss(rows: TrainRows, keys: jax.Array) -> jax.Array:
        return loss_sum(params, TINY, rows, keys=keys, dropout=0.3)

    def alone(row: int, key: jax.Array) -> jax.Array:
        return loss(TrainRows(*(part[row : row + 1] for part in rows)), key[None])

    together = loss(rows, keys)
    parts = [alone(row, keys[row]) for row in range(3)]
    np.testing.assert_allclose(together, sum(parts), rtol=1e-5)
    assert together != loss_sum(params, TINY, rows)
    assert alone(0, keys[1]) != parts[0]


def test_each_place_drops_its_own_values(monkeypatch: pytest.MonkeyPatch) -> None:
    """Attention puts out ones and the MLP hundreds, so the last hidden rows count the masks."""
    config = replace(TINY, hidden_size=64, num_layers=4)
    params = jax.tree.map(jnp.zeros_like, params_of(config))
    params["layers"]["attention"]["o_proj"]["bias"] += 1.0
    params["layers"]["mlp"]["down_proj"]["bias"] += 100.0
    monkeypatch.setattr("models.training.weighted_nll_sum", lambda logits, head, x, *rest: x)
    keys = jax.random.split(jax.random.key(0), 2)
    x = loss_sum(params, config, random_rows(config, [[20], [20]], 20), keys=keys, dropout=0.25)
    kept = np.round(np.asarray(x) * 0.75)
    attention, mlp = kept % 100, kept // 100
    for counts in (attention, mlp):
        # Masks that were the same in all layers would leave 0 and 4 only.
        shares = [(counts == count).mean() for count in range(5)]
        binomial = [0.0039, 0.0469, 0.2109, 0.4219, 0.3164]
        np.testing.assert_allclose(shares, binomial, atol=0.03)
        assert not np.array_equal(counts[:20], counts[20:])
    assert abs(np.corrcoef(attention.ravel(), mlp.ravel())[0, 1]) < 0.1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dropout": 1.0}, "dropout is 1.0"),
        ({"dropout": -0.1}, "dropout is -0.1"),
        ({"dropout": 0.1}, "needs keys"),
        ({"remat": "some"}, "remat 'some' is not known; use one of none, dots, full"),
    ],
)
def test_a_wrong_option_is_refused(options: dict, message: str) -> None:
    rows = random_rows(TINY, [[4]], 4)
    with pytest.raises(ValueError, match=message):
        loss_sum(params_of(TINY), TINY, rows, **options)


@pytest.mark.long
@pytest.mark.usefixtures("quick_compilation")
@pytest.mark.parametrize("variant", VARIANTS)
def test_every_variant_learns(variant: str) -> None:
    source = open_model(GOLDENS / variant)
    params = source.load_params(jnp.float32)
    rows = random_rows(source.config, [[31], [12, 15]], 32)
    optimizer = optax.adam(3e-3)
    gradient = gradient_of(source.config)

    @jax.jit
    def step(params, state):
        loss, slopes = gradient(params, rows)
        updates, state = optimizer.update(slopes, state)
        return optax.apply_updates(params, updates), state, loss

    state, losses = optimizer.init(params), []
    for _ in range(20):
        params, state, loss = step(params, state)
        losses.append(float(loss))
    assert losses[-1] < 0.7 * losses[0], losses
