"""What the output of a model's head means: vectors, labels, entities, scores. Pure: sessions run the forwards."""

from rabbit_engine.tasks.classification import Classification, LabelScore
from rabbit_engine.tasks.embedding import Embedder
from rabbit_engine.tasks.reranking import Relevance
from rabbit_engine.tasks.scoring import Score
from rabbit_engine.tasks.tagging import Entity

__all__ = ["Classification", "Embedder", "Entity", "LabelScore", "Relevance", "Score"]
