"""Operations of inference: each has one contract, a reference and a version for each device."""
