"""Operations on packed weights: one package per operation, with a readable twin and fast bodies."""
