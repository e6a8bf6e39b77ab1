"""Operations as torch custom ops, each with interchangeable backends."""
