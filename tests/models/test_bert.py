"""A BERT-type encoder: rows of transformers, embeddings, and what is refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tokenizers

from checkpoint.errors import FormatError
from checkpoint.param_loading import export_tensors, flatten, load_params
from models import bert, bert_names
from models.encoder_loading import config_from_bert, embed, open_encoder, pad_texts
from models.tokenizer import Tokenizer
from tests.checkpoint.memory_source import MemorySource

FOLDER = Path(__file__).parent.parent / "goldens" / "tiny_bert"
MINILM = Path(__file__).parent.parent / "goldens" / "minilm.json"
TOLERANCE = 1e-5
MINILM_TOLERANCE = 1e-6


@pytest.fixture(scope="module")
def golden() -> Any:
    return np.load(FOLDER / "rows.npz", allow_pickle=False)


def test_rows_equal_those_of_transformers(golden: Any) -> None:
    encoder = open_encoder(FOLDER)
    params = encoder.load_params(jnp.float32)
    run = jax.jit(lambda params, *batch: bert.encode(params, encoder.config, *batch))
    rows = np.asarray(run(params, golden["token_ids"], golden["num_tokens"]))
    counts = np.arange(rows.shape[1]) < golden["num_tokens"][:, None]
    assert np.abs(golden["rows"]).max() > 0.5
    np.testing.assert_allclose(rows[counts], golden["rows"][counts], rtol=0, atol=TOLERANCE)


def test_embeddings_are_normalised_means_and_ignore_padding(golden: Any) -> None:
    encoder = open_encoder(FOLDER)
    params = encoder.load_params(jnp.float32)
    run = jax.jit(lambda params, *batch: bert.embed_texts(params, encoder.config, *batch))
    token_ids, num_tokens = golden["token_ids"], golden["num_tokens"]
    vectors = np.asarray(run(params, token_ids, num_tokens))
    means = golden["rows"].sum(axis=1) / num_tokens[:, None]
    expected = means / np.linalg.norm(means, axis=-1, keepdims=True)
    np.testing.assert_allclose(vectors, expected, rtol=0, atol=TOLERANCE)
    scrambled = np.where(np.arange(20) < num_tokens[:, None], token_ids, 7).astype(np.int32)
    np.testing.assert_array_equal(np.asarray(run(params, scrambled, num_tokens)), vectors)


def test_the_name_table_goes_both_ways_bit_for_bit() -> None:
    config = open_encoder(FOLDER).config
    abstract = bert.abstract_params(config, jnp.bfloat16)
    generator = np.random.default_rng(0)
    made = jax.tree.map(lambda leaf: generator.normal(size=leaf.shape).astype(leaf.dtype), abstract)
    table = bert_names.hf_name_table(config)
    loaded = load_params(MemorySource(dict(export_tensors(made, table))), table, abstract)
    for path, leaf in flatten(made).items():
        assert np.asarray(flatten(loaded)[path]).tobytes() == leaf.tobytes(), path


def test_long_texts_are_cut_and_keep_their_last_token() -> None:
    backend = tokenizers.Tokenizer(
        tokenizers.models.WordLevel({"[CLS]": 0, "[SEP]": 1, "a": 2, "b": 3}, unk_token="[CLS]")
    )
    backend.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    backend.post_processor = tokenizers.processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 0), ("[SEP]", 1)]
    )
    token_ids, num_tokens = pad_texts(Tokenizer(backend), ["a b", "b b b b a"], max_tokens=5)
    assert num_tokens.tolist() == [4, 5]
    assert token_ids.tolist() == [[0, 2, 3, 1, 0], [0, 3, 3, 3, 1]]


def test_more_positions_than_the_model_has_are_refused() -> None:
    encoder = open_encoder(FOLDER)
    abstract = bert.abstract_params(encoder.config, jnp.float32)
    with pytest.raises(ValueError, match="21 positions, but the model has 20"):
        jax.eval_shape(
            lambda params: bert.encode(
                params, encoder.config, jnp.zeros((1, 21), jnp.int32), jnp.ones(1, jnp.int32)
            ),
            abstract,
        )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"architectures": ["RobertaModel"]}, "the only encoder that is supported is BertModel"),
        ({"position_embedding_type": "relative_key"}, "position_embedding_type 'relative_key'"),
        ({"is_decoder": True}, "is_decoder True"),
        ({"hidden_act": "relu"}, "hidden_act 'relu'"),
        ({"type_vocab_size": 3}, "type_vocab_size 3"),
    ],
)
def test_what_is_not_supported_is_refused_by_name(changes: dict[str, Any], message: str) -> None:
    fields = json.loads((FOLDER / "config.json").read_text())
    with pytest.raises(FormatError, match=message):
        config_from_bert(fields | changes)


def test_pooling_other_than_the_mean_is_refused(tmp_path: Path) -> None:
    folder = tmp_path / "encoder"
    shutil.copytree(FOLDER, folder)
    (folder / "1_Pooling").mkdir()
    pooling = folder / "1_Pooling" / "config.json"
    pooling.write_text('{"pooling_mode_cls_token": true, "pooling_mode_mean_tokens": false}')
    with pytest.raises(FormatError, match="pooling_mode_cls_token"):
        open_encoder(folder)
    pooling.write_text('{"pooling_mode_cls_token": false, "pooling_mode_mean_tokens": true}')
    (folder / "sentence_bert_config.json").write_text('{"max_seq_length": 12}')
    assert open_encoder(folder).max_tokens == 12


def test_a_folder_says_whether_its_vectors_have_length_one(tmp_path: Path) -> None:
    folder = tmp_path / "encoder"
    shutil.copytree(FOLDER, folder)
    assert open_encoder(folder).normalizes
    modules = [
        {"type": f"sentence_transformers.models.{name}"} for name in ("Transformer", "Pooling")
    ]
    (folder / "modules.json").write_text(json.dumps(modules))
    assert not open_encoder(folder).normalizes
    modules.append({"type": "sentence_transformers.models.Normalize"})
    (folder / "modules.json").write_text(json.dumps(modules))
    assert open_encoder(folder).normalizes
    modules.append({"type": "sentence_transformers.models.Dense"})
    (folder / "modules.json").write_text(json.dumps(modules))
    with pytest.raises(FormatError, match=r"modules\.json: Dense is not supported"):
        open_encoder(folder)
    (folder / "modules.json").write_text("{}")
    with pytest.raises(FormatError, match="must hold a list of JSON objects"):
        open_encoder(folder)


def test_means_that_are_not_normalised(golden: Any) -> None:
    encoder = open_encoder(FOLDER)
    params = encoder.load_params(jnp.float32)
    run = jax.jit(
        lambda params, *batch: bert.embed_texts(params, encoder.config, *batch, normalize=False)
    )
    vectors = np.asarray(run(params, golden["token_ids"], golden["num_tokens"]))
    means = golden["rows"].sum(axis=1) / golden["num_tokens"][:, None]
    np.testing.assert_allclose(vectors, means, rtol=0, atol=TOLERANCE)


@pytest.mark.long
@pytest.mark.real_model
def test_minilm_embeddings_equal_those_of_transformers() -> None:
    from jaxserve import model_store

    golden = json.loads(MINILM.read_text(encoding="utf-8"))
    encoder = open_encoder(model_store.resolve("all-minilm-l6-v2"))
    texts = [case["text"] for case in golden["cases"]]
    vectors = embed(encoder, encoder.load_params(jnp.float32), texts)
    expected = np.array([case["embedding"] for case in golden["cases"]])
    np.testing.assert_allclose(vectors, expected, rtol=0, atol=MINILM_TOLERANCE)
    cosines = (vectors * expected).sum(-1) / np.linalg.norm(expected, axis=-1)
    assert np.abs(cosines - 1).max() < MINILM_TOLERANCE
