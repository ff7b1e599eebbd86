"""One HTML page of a run or of several: `python -m baichuan_jax.report RUN [RUN ...]`."""
