"""The machinery of the corpus pipeline; the filters lie beside it in data/."""
