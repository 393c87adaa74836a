"""DistilBERT: BERT without token types and pooler."""

from __future__ import annotations

from tilewright.frontend.family import Family, HeadNames, Settings

DISTILBERT = Family(
    model_type="distilbert",
    prefix="distilbert.",
    settings=Settings(
        hidden_size="dim",
        num_heads="n_heads",
        num_layers="n_layers",
        intermediate_size="hidden_dim",
        activation="activation",
        layer_norm_eps=None,
        token_types=None,
    ),
    word="embeddings.word_embeddings",
    position="embeddings.position_embeddings",
    token_type=None,
    embeddings_norm="embeddings.LayerNorm",
    layer="transformer.layer.{}.",
    attention="attention",
    query="attention.q_lin",
    key="attention.k_lin",
    value="attention.v_lin",
    output="attention.out_lin",
    attention_norm="sa_layer_norm",
    up="ffn.lin1",
    down="ffn.lin2",
    output_norm="output_layer_norm",
    heads={
        "DistilBertModel": HeadNames("none"),
        "DistilBertForQuestionAnswering": HeadNames("question_answering", "qa_outputs"),
        "DistilBertForTokenClassification": HeadNames("token_classification", "classifier"),
        "DistilBertForSequenceClassification": HeadNames("sequence_classification", "classifier", "pre_classifier", "relu"),
        "DistilBertForMaskedLM": HeadNames("none", unused=("vocab_*",)),
    },
    unused=("embeddings.position_ids",),
)
