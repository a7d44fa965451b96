"""Keys and values of texts that do not fit where the model computes: in blocks elsewhere, whole while their layer runs."""
