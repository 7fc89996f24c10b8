"""Operations done row by row: RMSNorm, rotary embedding, gated SiLU."""
