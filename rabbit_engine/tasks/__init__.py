"""What the output of a model's head means: vectors, labels, entities, scores. Pure: sessions run the forwards."""
