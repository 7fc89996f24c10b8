"""Tuners of PEFT beside LoRA and IA3, by what their layers compute."""
