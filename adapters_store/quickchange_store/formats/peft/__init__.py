"""PEFT's formats: LoRA, DoRA and IA3 directories."""
