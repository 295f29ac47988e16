"""SAM 3D Objects: parts of a user's own installation as models that can be trained."""
