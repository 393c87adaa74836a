"""BERT, and what shares its tensors (MiniLM, BGE, GTE, E5 embedding models)."""

from __future__ import annotations

from tilewright.frontend.family import Family, HeadNames, Settings

BERT = Family(
    model_type="bert",
    prefix="bert.",
    settings=Settings(
        hidden_size="hidden_size",
        num_heads="num_attention_heads",
        num_layers="num_hidden_layers",
        intermediate_size="intermediate_size",
        activation="hidden_act",
        layer_norm_eps="layer_norm_eps",
        token_types="type_vocab_size",
    ),
    word="embeddings.word_embeddings",
    position="embeddings.position_embeddings",
    token_type="embeddings.token_type_embeddings",
    embeddings_norm="embeddings.LayerNorm",
    layer="encoder.layer.{}.",
    attention="attention.self",
    query="attention.self.query",
    key="attention.self.key",
    value="attention.self.value",
    output="attention.output.dense",
    attention_norm="attention.output.LayerNorm",
    up="intermediate.dense",
    down="output.dense",
    output_norm="output.LayerNorm",
    heads={
        # the sentence embedding is the mean over the tokens, so the pooler of the first token takes no part in it
        "BertModel": HeadNames("none", unused=("pooler.*",)),
        "BertForQuestionAnswering": HeadNames("question_answering", "qa_outputs", unused=("pooler.*",)),
        "BertForTokenClassification": HeadNames("token_classification", "classifier", unused=("pooler.*",)),
        "BertForSequenceClassification": HeadNames("sequence_classification", "classifier", "pooler.dense", "tanh"),
        "BertForMaskedLM": HeadNames("none", unused=("pooler.*", "cls.*")),
        "BertForPreTraining": HeadNames("none", unused=("pooler.*", "cls.*")),
    },
    unused=("embeddings.position_ids", "embeddings.token_type_ids"),
)
