"""The packaged mesh decoder, its weights and its losses."""
