"""Operations that differ by device: plain mathematics, fast paths, and the choice between them."""
