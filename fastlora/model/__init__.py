"""Operations on a whole model: select, inject, switch, merge, fuse."""
