"""Several tokens a pass: drafts guess a tree of tokens, one pass of the model verifies it, and the text stays the same."""

from rabbit_engine.decoding.draft import Allowance, Draft, Drafter, Heads, StatesReader, TargetModel, Verdict
from rabbit_engine.decoding.draft_model import DraftModel, SelfDraft, claimed_bytes
from rabbit_engine.decoding.findings import Findings
from rabbit_engine.decoding.lookup import Lookup
from rabbit_engine.decoding.merged import Merged
from rabbit_engine.decoding.multi_token import NO_HEADS, MultiTokenHeads
from rabbit_engine.decoding.prior import Prior
from rabbit_engine.decoding.rule import Rule
from rabbit_engine.decoding.speculation import Speculation, Speculator
from rabbit_engine.decoding.support import ModelTraits, why_plain
from rabbit_engine.decoding.tree import EMPTY, ROOT, Tree

__all__ = [
    "EMPTY",
    "NO_HEADS",
    "ROOT",
    "Allowance",
    "Draft",
    "DraftModel",
    "Drafter",
    "Findings",
    "Heads",
    "Lookup",
    "Merged",
    "ModelTraits",
    "MultiTokenHeads",
    "Prior",
    "Rule",
    "SelfDraft",
    "Speculation",
    "Speculator",
    "StatesReader",
    "TargetModel",
    "Tree",
    "Verdict",
    "claimed_bytes",
    "why_plain",
]
