"""What is done to a whole model: select, inject, switch, merge, fuse."""
