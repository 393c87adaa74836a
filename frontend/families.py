"""The table of supported architectures, by config.json's `model_type`."""

from __future__ import annotations

from collections.abc import Mapping

from tilewright.frontend.bert import BERT
from tilewright.frontend.distilbert import DISTILBERT
from tilewright.frontend.family import Family
from tilewright.frontend.roberta import ROBERTA, XLM_ROBERTA

FAMILIES: Mapping[str, Family] = {family.model_type: family for family in (BERT, DISTILBERT, ROBERTA, XLM_ROBERTA)}
