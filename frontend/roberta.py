"""RoBERTa and XLM-R: BERT's tensors, positions counted from the row after padding's, and other heads."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from tilewright.frontend.bert import BERT
from tilewright.frontend.family import Family, HeadNames


def _heads(name: str) -> Mapping[str, HeadNames]:
    return {
        f"{name}Model": HeadNames("none", unused=("pooler.*",)),
        f"{name}ForQuestionAnswering": HeadNames("question_answering", "qa_outputs"),
        f"{name}ForTokenClassification": HeadNames("token_classification", "classifier"),
        f"{name}ForSequenceClassification": HeadNames(
            "sequence_classification", "classifier.out_proj", "classifier.dense", "tanh"
        ),
        f"{name}ForMaskedLM": HeadNames("none", unused=("lm_head.*",)),
    }


ROBERTA: Family = replace(BERT, model_type="roberta", prefix="roberta.", first_position=2, heads=_heads("Roberta"))
XLM_ROBERTA: Family = replace(ROBERTA, model_type="xlm-roberta", heads=_heads("XLMRoberta"))
