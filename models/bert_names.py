"""Name table of BERT-type encoders in Hugging Face folders."""

from __future__ import annotations

from checkpoint.name_table import NameTable
from models import bert
from models.config import ModelConfig
from models.name_rules import FileNames, make_name_table

HF = FileNames(
    embed="embeddings.word_embeddings.weight",
    embeddings={
        "position_embed": "embeddings.position_embeddings.weight",
        "type_embed": "embeddings.token_type_embeddings.weight",
    },
    other_names={"embed_norm": "embeddings.LayerNorm"},
    layer_prefix="encoder.layer.{layer}.",
    layer_names={
        "attention.q_proj": "attention.self.query",
        "attention.k_proj": "attention.self.key",
        "attention.v_proj": "attention.self.value",
        "attention.o_proj": "attention.output.dense",
        "attention_norm": "attention.output.LayerNorm",
        "mlp.up_proj": "intermediate.dense",
        "mlp.down_proj": "output.dense",
        "mlp_norm": "output.LayerNorm",
    },
    # The pooler serves BERT's own pre-training task, not embeddings.
    ignored=(r"pooler\.dense\.(weight|bias)", r"embeddings\.position_ids"),
)


def hf_name_table(config: ModelConfig) -> NameTable:
    """Names of a Hugging Face `BertModel`."""
    return make_name_table(bert, config, HF)
