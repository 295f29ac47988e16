"""SAM 3D Objects' modules from a user's own installation."""
