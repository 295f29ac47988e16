"""The interface of a model to training, and the packaged mesh decoder with its weights and losses."""
