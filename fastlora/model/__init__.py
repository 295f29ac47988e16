"""Operations on a model: select layers, inject, switch, merge and fuse adapters."""
