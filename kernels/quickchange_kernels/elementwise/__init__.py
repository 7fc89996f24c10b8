"""Row-wise operations: RMSNorm, rotary embedding, gated SiLU."""
